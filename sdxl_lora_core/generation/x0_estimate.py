"""What a sampler takes the finished image to be while it is still at work, for pictures of it on the way."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OnEstimate = Callable[[Tensor], object]


def tell_estimates(scheduler: Any, on_estimate: OnEstimate) -> None:
    """Before each step of one of diffusers' schedulers `on_estimate` gets the estimate, float32 [B, 4, h, w]."""
    own = scheduler.step

    @functools.wraps(own)  # the pipeline looks at which arguments it takes
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **named: Any) -> Any:
        on_estimate(clean_estimate(scheduler, model_output, timestep, sample))
        return own(model_output, timestep, sample, *args, **named)

    scheduler.step = step


def clean_estimate(scheduler: Any, model_output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
    """The clean latents that the UNet's answer stands for, float32, at the scheduler's present step.

    With sample = a x0 + s noise, where a and s are the scheduler's own: epsilon is the noise, v = (a noise - s x0) / r
    with r^2 = a^2 + s^2 (Salimans and Ho, arXiv 2202.00512, section 4, where r is 1). At the points between two steps
    of dpmpp_sde it is rough: diffusers knows no noise level there.
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
