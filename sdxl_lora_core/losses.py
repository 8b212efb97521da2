"""What the UNet is asked to predict, at which noise, and how far off it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from .train_config import TrainConfig


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

    def timestep(self, draw: torch.Generator) -> int:
        return int(torch.randint(self.scheduler.config.num_train_timesteps, (1,), generator=draw))

    def noise(self, latents: Tensor, draw: torch.Generator) -> Tensor:
        """Noise for the latents [4, H/8, W/8] of one sample."""
        return torch.randn(latents.shape, generator=draw)

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the UNet sees, float32 [B, 4, H/8, W/8]."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Epsilon (Ho et al., arXiv 2006.11239, eq. 14) or v (Salimans and Ho, arXiv 2202.00512, appendix D)."""
        if self.prediction_type == "epsilon":
            return noise
        return self.scheduler.get_velocity(latents, noise, timesteps)

    def losses(self, prediction: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Mean squared error of each sample, float32 [B]."""
        target = self.target(latents, noise, timesteps)
        return mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
