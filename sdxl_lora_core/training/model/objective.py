"""The training objective: noisy inputs, prediction targets and losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import huber_loss, mse_loss, smooth_l1_loss

from ..config.loss import LossSettings


class Objective:
    """The objective of a run: the noise schedule of the base and the loss of `settings`."""

    def __init__(self, scheduler: Any, settings: LossSettings) -> None:
        """Raises ValueError for a prediction type that SDXL bases do not have."""
        self.scheduler, self.settings = scheduler, settings
        self.prediction_type = scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"prediction_type is {self.prediction_type!r}: SDXL bases predict 'epsilon' or 'v_prediction'"
            )
        self.weights = self._weights()

    def to(self, device: torch.device) -> None:
        """Moves the noise schedule and the weights.

        diffusers would move the schedule in the first step, which may be that of the memory plan, with fake tensors.
        """
        self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.to(device)
        self.weights = self.weights.to(device)

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The input of the UNet, float32 [B, 4, H/8, W/8]."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Epsilon (Ho et al., arXiv 2006.11239, eq. 14) or v (Salimans and Ho, arXiv 2202.00512, appendix D)."""
        if self.prediction_type == "epsilon":
            return noise
        return self.scheduler.get_velocity(latents, noise, timesteps)

    def losses(
        self, prediction: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor, masks: Tensor | None = None
    ) -> Tensor:
        """The loss of each sample, weighted by timestep, float32 [B]. `masks` [B, 1, H/8, W/8] weight its pixels."""
        target = self.target(latents, noise, timesteps)
        errors = _mean(self._errors(prediction.float(), target.float()), masks)
        return self.weights[timesteps] * errors

    def squared_errors(
        self, prediction: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor, masks: Tensor | None = None
    ) -> Tensor:
        """Mean squared error of each sample, float32 [B]: comparable between runs with different losses."""
        target = self.target(latents, noise, timesteps)
        return _mean(mse_loss(prediction.float(), target.float(), reduction="none"), masks)

    def _errors(self, prediction: Tensor, target: Tensor) -> Tensor:
        if self.settings.loss == "huber":
            return huber_loss(prediction, target, reduction="none", delta=self.settings.huber_delta)
        if self.settings.loss == "smooth_l1":
            return smooth_l1_loss(prediction, target, reduction="none", beta=self.settings.huber_delta)
        return mse_loss(prediction, target, reduction="none")

    def _weights(self) -> Tensor:
        """The weight of each timestep, float32 [T].

        A squared error of the image is multiplied by SNR in epsilon and by SNR + 1 in v, so a weight on the image is
        divided by that. Min-SNR-gamma: Hang et al., arXiv 2303.09556, section 3.4. Debiased
        estimation: Yu et al., arXiv 2310.08442, where it is 1/sqrt(SNR) on epsilon.
        """
        kept = self.scheduler.alphas_cumprod
        snr = kept / (1 - kept)
        if self.settings.snr_gamma:
            on_image = snr.clamp(max=self.settings.snr_gamma)
        elif self.settings.debiased:
            on_image = snr.sqrt()
        else:
            return torch.ones_like(snr)
        return on_image / (snr if self.prediction_type == "epsilon" else snr + 1)


def _mean(errors: Tensor, masks: Tensor | None) -> Tensor:
    """The mean of each sample over its masked area only, so that a small mask has the same weight as a large one."""
    if masks is None:
        return errors.mean(dim=(1, 2, 3))
    return (errors * masks).sum(dim=(1, 2, 3)) / (masks.sum(dim=(1, 2, 3)) * errors.shape[1]).clamp_min(1e-6)
