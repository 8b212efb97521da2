"""What the UNet is asked to predict, and how far off it is."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import mse_loss


def training_target(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Epsilon (Ho et al., arXiv 2006.11239, eq. 14) or v (Salimans and Ho, arXiv 2202.00512, appendix D) [B, 4, H, W].

    Raises ValueError for a prediction type that SDXL bases do not have.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    raise ValueError(f"prediction_type is {kind!r}: SDXL bases predict 'epsilon' or 'v_prediction'")


def loss_per_sample(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, float32 [B]."""
    return mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
