"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): whether, between which noise levels, and rescaled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..control.controlled_unet import way_done
from ..sdxl.base import SDXLBase
from .config import BASES_RESCALE, GenerateConfig

_ZERO_SNR_RESCALE = 0.7  # phi of Lin et al., arXiv 2305.08891, section 3.4


def is_guided(config: GenerateConfig) -> bool:
    """At 1 and below the negative prompt has no say."""
    return config.guidance > 1


def guidance_rescale(base: SDXLBase, config: GenerateConfig) -> float:
    """How far the guided prediction is brought back to the spread of the one for the prompt: 0 not, 1 wholly."""
    if config.guidance_rescale != BASES_RESCALE:
        return config.guidance_rescale
    return _ZERO_SNR_RESCALE if base.zero_terminal_snr else 0.0


def guidance_settings(base: SDXLBase, config: GenerateConfig) -> dict[str, Any]:
    """What of guidance decides the image, beside its strength; nothing when all of it is plain."""
    if not is_guided(config):
        return {}
    rescale, interval = guidance_rescale(base, config), [float(config.guidance_start), float(config.guidance_end)]
    return {
        **({"guidance_rescale": float(rescale)} if rescale else {}),
        **({"guidance_interval": interval} if interval != [0, 1] else {}),
    }


@contextmanager
def guidance_interval(unet: nn.Module, config: GenerateConfig, noise_levels: int) -> Iterator[None]:
    """Inside, the UNet sees no negative prompt at noise levels out of the interval (Kynkaanniemi et al., 2404.07724).

    Its answer to the prompt then stands for both, which makes the guided prediction exactly that answer, at half the
    cost. `noise_levels` are those of the training.
    """
    if not is_guided(config) or (config.guidance_start, config.guidance_end) == (0, 1):
        yield
        return
    outside = False

    def before(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        nonlocal outside
        outside = not config.guidance_start <= way_done(inputs[1], noise_levels) <= config.guidance_end
        return _second_half((inputs, named), len(inputs[0])) if outside else None

    def after(_: nn.Module, __: Any, output: tuple[Tensor, ...]) -> Any:
        return (output[0].repeat(2, 1, 1, 1),) if outside else None

    hooks = unet.register_forward_pre_hook(before, with_kwargs=True), unet.register_forward_hook(after)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _second_half(value: Any, batch: int) -> Any:
    """Of every tensor of `batch` rows in a structure: the rows of the prompt, which stand after the negative ones."""
    if isinstance(value, Tensor):
        return value[batch // 2 :] if value.dim() and len(value) == batch else value
    if isinstance(value, dict):
        return {name: _second_half(item, batch) for name, item in value.items()}
    return type(value)(_second_half(item, batch) for item in value) if isinstance(value, tuple | list) else value
