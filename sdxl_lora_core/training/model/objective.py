"""What the UNet is asked to predict, at which noise, and how far off it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import huber_loss, interpolate, mse_loss, smooth_l1_loss

from ..config.train_config import TrainConfig


class Objective:
    """The training objective of one run: DDPM noise on the base's own schedule, and the loss that `config` asks for.

    Everything random is drawn from the generator of one sample, on the CPU.
    """

    def __init__(self, scheduler: Any, config: TrainConfig) -> None:
        """Raises ValueError for a prediction type that SDXL bases do not have."""
        self.scheduler, self.config = scheduler, config
        self.prediction_type = scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"prediction_type is {self.prediction_type!r}: SDXL bases predict 'epsilon' or 'v_prediction'"
            )
        self.weights = self._weights()

    def to(self, device: torch.device) -> None:
        """diffusers would do so in the first step, which may be the memory plan's, on tensors without contents."""
        self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.to(device)

    def timestep(self, draw: torch.Generator) -> int:
        """A timestep within the range of `config`, uniform or logit-normal (Esser et al., arXiv 2403.03206, eq. 19)."""
        low, high = self.config.timestep_min, self.config.timestep_max
        if self.config.timestep_sampling == "uniform":
            return int(torch.randint(low, high + 1, (1,), generator=draw))
        normal = self.config.logit_mean + self.config.logit_std * torch.randn(1, generator=draw)
        return min(low + int(normal.sigmoid() * (high + 1 - low)), high)

    def noise(self, latents: Tensor, draw: torch.Generator) -> Tensor:
        """Noise for the latents [4, H/8, W/8] of one sample."""
        noise = torch.randn(latents.shape, generator=draw)
        if self.config.noise_offset:  # Guttenberg, "Diffusion with Offset Noise"
            noise += self.config.noise_offset * torch.randn(len(latents), 1, 1, generator=draw)
        if self.config.multires_noise_iterations:
            noise = self._with_coarse_noise(noise, draw)
        return noise

    def input_noise(self, noise: Tensor, draw: torch.Generator) -> Tensor:
        """What is mixed into the sample when `noise` is asked for: more than that, if the input is to be perturbed.

        Ning et al., arXiv 2301.11706, algorithm 1.
        """
        if not self.config.input_perturbation:
            return noise
        return noise + self.config.input_perturbation * torch.randn(noise.shape, generator=draw)

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the UNet sees, float32 [B, 4, H/8, W/8]."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Epsilon (Ho et al., arXiv 2006.11239, eq. 14) or v (Salimans and Ho, arXiv 2202.00512, appendix D)."""
        if self.prediction_type == "epsilon":
            return noise
        return self.scheduler.get_velocity(latents, noise, timesteps)

    def losses(
        self, prediction: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor, masks: Tensor | None = None
    ) -> Tensor:
        """The loss of each sample, weighted by its timestep, float32 [B]. Masks, [B, 1, H/8, W/8], are 1 to learn."""
        target = self.target(latents, noise, timesteps)
        errors = _mean(self._errors(prediction.float(), target.float()), masks)
        return self.weights.to(errors.device)[timesteps] * errors

    def squared_errors(
        self, prediction: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor, masks: Tensor | None = None
    ) -> Tensor:
        """Mean squared error of each sample, float32 [B]: the same measure for every run, whatever it is trained by."""
        target = self.target(latents, noise, timesteps)
        return _mean(mse_loss(prediction.float(), target.float(), reduction="none"), masks)

    def _errors(self, prediction: Tensor, target: Tensor) -> Tensor:
        if self.config.loss == "huber":
            return huber_loss(prediction, target, reduction="none", delta=self.config.huber_delta)
        if self.config.loss == "smooth_l1":
            return smooth_l1_loss(prediction, target, reduction="none", beta=self.config.huber_delta)
        return mse_loss(prediction, target, reduction="none")

    def _weights(self) -> Tensor:
        """The weight of each timestep, float32 [T].

        The same miss of the image is SNR times as large in epsilon and SNR + 1 times in v (squared), so a weight meant
        for the image is divided by that. Min-SNR-gamma: Hang et al., arXiv 2303.09556, section 3.4. Debiased
        estimation: Yu et al., arXiv 2310.08442, where it is 1/sqrt(SNR) on epsilon.
        """
        kept = self.scheduler.alphas_cumprod
        snr = kept / (1 - kept)
        if self.config.snr_gamma:
            on_image = snr.clamp(max=self.config.snr_gamma)
        elif self.config.debiased:
            on_image = snr.sqrt()
        else:
            return torch.ones_like(snr)
        return on_image / (snr if self.prediction_type == "epsilon" else snr + 1)

    def _with_coarse_noise(self, noise: Tensor, draw: torch.Generator) -> Tensor:
        """Adds noise of ever lower resolution, each two to four times coarser, at unit variance in the end.

        Whitaker, "Multi-Resolution Noise for Diffusion Model Training".
        """
        channels, *sides = noise.shape
        for level in range(1, self.config.multires_noise_iterations + 1):
            ratio = 2 + 2 * torch.rand(1, generator=draw).item()
            coarse = [max(1, int(side / ratio**level)) for side in sides]
            layer = torch.randn(1, channels, *coarse, generator=draw)
            noise += self.config.multires_noise_discount**level * interpolate(layer, sides, mode="bilinear")[0]
            if min(coarse) == 1:
                break
        return noise / noise.std()


def _mean(errors: Tensor, masks: Tensor | None) -> Tensor:
    """The mean of each sample. It is one over the mask's area, so that a small mask does not learn slower."""
    if masks is None:
        return errors.mean(dim=(1, 2, 3))
    return (errors * masks).sum(dim=(1, 2, 3)) / (masks.sum(dim=(1, 2, 3)) * errors.shape[1]).clamp_min(1e-6)
