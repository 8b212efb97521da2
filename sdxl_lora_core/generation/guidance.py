"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) with rescale and an interval of noise levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..sdxl.base import SDXLBase
from ..sdxl.detection import read_json
from ..sdxl.noise_levels import is_within
from .config import BASES_RESCALE, GenerateConfig

_ZERO_SNR_RESCALE = 0.7  # phi of Lin et al., arXiv 2305.08891, section 3.4


@dataclass(frozen=True)
class Guidance:
    """Guidance of strength `scale` between two positions of the noise schedule, 0 the noisiest, 1 the cleanest.

    `rescale` (phi in Lin et al., arXiv 2305.08891, section 3.4; 0 to 1) scales the guided prediction towards the
    standard deviation of the conditional one.
    """

    scale: float
    rescale: float = 0.0
    start: float = 0.0
    end: float = 1.0

    def is_active(self, progress: float) -> bool:
        """Whether there is guidance at this position (Kynkaanniemi et al., arXiv 2404.07724)."""
        return is_within(progress, self.start, self.end)

    def combine(self, unconditional: Tensor, conditional: Tensor) -> Tensor:
        """The guided prediction, [B, 4, h, w] as both of the UNet."""
        guided = unconditional + self.scale * (conditional - unconditional)
        if not self.rescale:
            return guided
        axes = list(range(1, guided.dim()))
        ratio = conditional.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True)
        return self.rescale * (guided * ratio) + (1 - self.rescale) * guided


def guidance_of(base: SDXLBase, config: GenerateConfig) -> Guidance | None:
    """The guidance of a request; None where it is off."""
    if not is_guided(config):
        return None
    return Guidance(config.guidance, guidance_rescale(base, config), config.guidance_start, config.guidance_end)


def scale_embedding(unet: Any, scale: float, rows: int) -> Tensor | None:
    """The guidance scale as an input of a UNet that was distilled to it, [rows, width]; None for any other UNet.

    Source: Meng et al., arXiv 2210.03142, section 3.1; embedded as diffusers' pipelines do.
    """
    width = unet.config.time_cond_proj_dim
    if width is None:
        return None
    from diffusers.models.embeddings import get_timestep_embedding

    scales = torch.full((rows,), (scale - 1) * 1000)
    return get_timestep_embedding(scales, width, downscale_freq_shift=1).to(unet.device, unet.dtype)


def is_guided(config: GenerateConfig) -> bool:
    """Whether the negative prompt has an effect: only at a guidance scale above 1."""
    return config.guidance > 1


def uses_negative_prompt(base: SDXLBase, config: GenerateConfig) -> bool:
    """Whether the negative prompt has an effect with this base: not if its UNet was distilled to guidance scales."""
    distilled = read_json(base.configs / "unet" / "config.json").get("time_cond_proj_dim")
    return is_guided(config) and distilled is None


def guidance_rescale(base: SDXLBase, config: GenerateConfig) -> float:
    """The rescale of a request, 0 to 1; by default that which bases with zero terminal SNR need, else 0."""
    if config.guidance_rescale != BASES_RESCALE:
        return config.guidance_rescale
    return _ZERO_SNR_RESCALE if base.zero_terminal_snr else 0.0


def guidance_settings(base: SDXLBase, config: GenerateConfig) -> dict[str, Any]:
    """The part of an image's key that guidance adds beside its scale; empty at the defaults."""
    if not is_guided(config):
        return {}
    rescale, interval = guidance_rescale(base, config), [float(config.guidance_start), float(config.guidance_end)]
    return {
        **({"guidance_rescale": float(rescale)} if rescale else {}),
        **({"guidance_interval": interval} if interval != [0, 1] else {}),
    }
