"""Samples the timestep and the noise of a training sample."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..config.loss import LossSettings


class NoiseSampler:
    """Samples timesteps and noise by `settings`, on the CPU, with the generator of one training sample."""

    def __init__(self, settings: LossSettings) -> None:
        self.settings = settings

    def timestep(self, random: torch.Generator) -> int:
        """A timestep within the range, uniform or logit-normal (Esser et al., arXiv 2403.03206, eq. 19)."""
        low, high = self.settings.timestep_min, self.settings.timestep_max
        if self.settings.timestep_sampling == "uniform":
            return int(torch.randint(low, high + 1, (1,), generator=random))
        normal = self.settings.logit_mean + self.settings.logit_std * torch.randn(1, generator=random)
        return min(low + int(normal.sigmoid() * (high + 1 - low)), high)

    def noise(self, latents: Tensor, random: torch.Generator) -> Tensor:
        """The noise for the latents [4, H/8, W/8] of one sample, which the UNet is trained to predict."""
        noise = torch.randn(latents.shape, generator=random)
        if self.settings.noise_offset:  # Guttenberg, "Diffusion with Offset Noise"
            noise += self.settings.noise_offset * torch.randn(len(latents), 1, 1, generator=random)
        if self.settings.multires_noise_iterations:
            noise = self._with_coarse_noise(noise, random)
        return noise

    def input_noise(self, noise: Tensor, random: torch.Generator) -> Tensor:
        """The noise added to the input: `noise` itself, plus input perturbation if it is on.

        Ning et al., arXiv 2301.11706, algorithm 1.
        """
        if not self.settings.input_perturbation:
            return noise
        return noise + self.settings.input_perturbation * torch.randn(noise.shape, generator=random)

    def _with_coarse_noise(self, noise: Tensor, random: torch.Generator) -> Tensor:
        """Adds noise of decreasing resolution, each two to four times coarser, normalised to unit variance.

        Whitaker, "Multi-Resolution Noise for Diffusion Model Training".
        """
        channels, *sides = noise.shape
        for level in range(1, self.settings.multires_noise_iterations + 1):
            ratio = 2 + 2 * torch.rand(1, generator=random).item()
            coarse = [max(1, int(side / ratio**level)) for side in sides]
            layer = torch.randn(1, channels, *coarse, generator=random)
            noise += self.settings.multires_noise_discount**level * interpolate(layer, sides, mode="bilinear")[0]
            if min(coarse) == 1:
                break
        return noise / noise.std()
