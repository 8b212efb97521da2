"""The random numbers of a training sample: its timestep and its noise."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..config.loss import LossSettings


class NoiseSampler:
    """Timesteps and noise as `settings` ask for them, on the CPU, from the generator of one sample."""

    def __init__(self, settings: LossSettings) -> None:
        self.settings = settings

    def timestep(self, draw: torch.Generator) -> int:
        """A timestep within the range of `config`, uniform or logit-normal (Esser et al., arXiv 2403.03206, eq. 19)."""
        low, high = self.settings.timestep_min, self.settings.timestep_max
        if self.settings.timestep_sampling == "uniform":
            return int(torch.randint(low, high + 1, (1,), generator=draw))
        normal = self.settings.logit_mean + self.settings.logit_std * torch.randn(1, generator=draw)
        return min(low + int(normal.sigmoid() * (high + 1 - low)), high)

    def noise(self, latents: Tensor, draw: torch.Generator) -> Tensor:
        """Noise for the latents [4, H/8, W/8] of one sample."""
        noise = torch.randn(latents.shape, generator=draw)
        if self.settings.noise_offset:  # Guttenberg, "Diffusion with Offset Noise"
            noise += self.settings.noise_offset * torch.randn(len(latents), 1, 1, generator=draw)
        if self.settings.multires_noise_iterations:
            noise = self._with_coarse_noise(noise, draw)
        return noise

    def input_noise(self, noise: Tensor, draw: torch.Generator) -> Tensor:
        """What is mixed into the sample when `noise` is asked for: more than that, if the input is to be perturbed.

        Ning et al., arXiv 2301.11706, algorithm 1.
        """
        if not self.settings.input_perturbation:
            return noise
        return noise + self.settings.input_perturbation * torch.randn(noise.shape, generator=draw)

    def _with_coarse_noise(self, noise: Tensor, draw: torch.Generator) -> Tensor:
        """Adds noise of ever lower resolution, each two to four times coarser, at unit variance in the end.

        Whitaker, "Multi-Resolution Noise for Diffusion Model Training".
        """
        channels, *sides = noise.shape
        for level in range(1, self.settings.multires_noise_iterations + 1):
            ratio = 2 + 2 * torch.rand(1, generator=draw).item()
            coarse = [max(1, int(side / ratio**level)) for side in sides]
            layer = torch.randn(1, channels, *coarse, generator=draw)
            noise += self.settings.multires_noise_discount**level * interpolate(layer, sides, mode="bilinear")[0]
            if min(coarse) == 1:
                break
        return noise / noise.std()
