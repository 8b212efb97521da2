"""An estimate of the clean latents during denoising, for preview images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OnEstimate = Callable[[Tensor], object]


def clean_estimate(scheduler: Any, model_output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
    """The clean latents implied by a prediction at the scheduler's current step, float32 [B, 4, h, w].

    Let sample = a x0 + s noise with the scheduler's own a and s. Epsilon is the noise, and v = (a noise - s x0) / r
    with r^2 = a^2 + s^2 (Salimans and Ho, arXiv 2202.00512, section 4, where r is 1). At the intermediate points of
    dpmpp_sde the estimate is rough, because diffusers has no noise level for them.
    """
    answer, sample = model_output.float(), sample.float()
    when = torch.as_tensor(timestep, device=sample.device).reshape(1)
    one, zero = torch.ones_like(sample[:1]), torch.zeros_like(sample[:1])
    a = scheduler.add_noise(one, zero, when).flatten()[0]
    s = scheduler.add_noise(zero, one, when).flatten()[0]
    if scheduler.config.prediction_type == "epsilon":
        return (sample - s * answer) / a
    r = (a**2 + s**2).sqrt()
    return (a * sample / r - s * answer) / r
