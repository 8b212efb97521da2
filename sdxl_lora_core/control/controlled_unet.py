"""ControlNets beside a UNet while it denoises."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..images.crop import fit_image
from ..sdxl.latents import VAE_SCALE
from .config import ControlConfig
from .control import type_index

Residuals = tuple[Sequence[Tensor], Tensor]  # for the UNet's skips on the way down, and for its middle


class ActiveControl(NamedTuple):
    """`net` is a ControlNetModel or ControlNetUnionModel; `hints`, uint8 [H, W, 3], has one for each image."""

    net: Any
    hints: Sequence[np.ndarray]
    config: ControlConfig


@contextmanager
def controlled(unet: nn.Module, controls: Sequence[ActiveControl], noise_levels: int) -> Iterator[None]:
    """Inside, what the ControlNets make of the UNet's inputs is added to what its way down gives, summed over them.

    Enter it within guidance_interval: the nets then see the batch that the UNet sees. `noise_levels` are those of the
    training; out of its interval a net is not called. Hints are fitted to the image that the latents will become.
    """
    if not controls:
        yield
        return

    @functools.cache
    def fitted(control: int, height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        pixels = np.stack([fit_image(hint, width, height) for hint in controls[control].hints])
        return (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255).to(device, dtype)

    def before(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        sample, timestep = inputs[:2]
        done = way_done(timestep, noise_levels)
        height, width = (VAE_SCALE * side for side in sample.shape[-2:])
        answers = [
            _answer(control, sample, timestep, named, fitted(number, height, width, sample.device, sample.dtype))
            for number, control in enumerate(controls)
            if _acts(control.config, done)
        ]
        return (inputs, {**named, **_added(answers)}) if answers else None

    hook = unet.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _acts(config: ControlConfig, done: float) -> bool:
    """At the ends, 0 and 1, whatever the rounding of the noise level."""
    return (not config.start_percent or config.start_percent <= done) and (
        config.end_percent == 1 or done <= config.end_percent
    )


def _answer(
    control: ActiveControl, sample: Tensor, timestep: Tensor, named: dict[str, Any], hints: Tensor
) -> Residuals:
    hints = hints.repeat(len(sample) // len(hints), 1, 1, 1)  # for negative and positive prompts alike
    arguments: dict[str, Any] = {"controlnet_cond": hints}
    if types := control.net.config.get("num_control_type"):
        index = type_index(control.config)
        chosen = torch.zeros(len(sample), types).to(sample)
        chosen[:, index] = 1
        arguments = {"controlnet_cond": [hints], "control_type": chosen, "control_type_idx": [index]}
    return control.net(
        sample,
        timestep,
        encoder_hidden_states=named["encoder_hidden_states"],
        added_cond_kwargs=named["added_cond_kwargs"],
        conditioning_scale=control.config.strength,
        return_dict=False,
        **arguments,
    )


def _added(answers: Sequence[Residuals]) -> dict[str, Any]:
    downs, mids = zip(*answers, strict=True)
    return {
        "down_block_additional_residuals": [sum(residuals[1:], residuals[0]) for residuals in zip(*downs, strict=True)],
        "mid_block_additional_residual": sum(mids[1:], mids[0]),
    }


def way_done(timestep: Tensor, noise_levels: int) -> float:
    """The share of the way from the noisiest of the training's `noise_levels` to the cleanest, 0 to 1."""
    return 1 - float(timestep) / (noise_levels - 1)
