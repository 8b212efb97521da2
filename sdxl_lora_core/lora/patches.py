"""Converts LoRAs of any key format to the form that ComfyUI's own loader accepts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..sdxl.family import Part
from .modules import LoRAFile, LoRAModule
from .stack import StackEntry
from .writing import kohya_state_dict


class ComfyUIPatch(NamedTuple):
    """Tensors by kohya's keys, float32, and the strength of all of them."""

    tensors: dict[str, Tensor]
    strength: float


def comfyui_patches(entry: StackEntry, parts: Sequence[Part]) -> list[ComfyUIPatch]:
    """The patches of a LoRA for some parts: one for each strength, as block factors make several.

    Raises ValueError for a DoRA in peft's form, whose magnitudes ComfyUI defines differently.
    """
    by_strength: dict[float, LoRAFile] = {}
    for part in parts:
        strength_of = entry.strength_by_module(part)
        for name, module in entry.modules(part).items():
            if isinstance(module, LoRAModule) and module.magnitude is not None:
                raise ValueError(
                    f"LoRA {entry.ref.name} is a DoRA in peft's form, which ComfyUI's MODEL does not support: save it "
                    "in the kohya format, or generate with SDXL Generate (cached)"
                )
            if strength := strength_of(name):
                by_strength.setdefault(strength, LoRAFile()).parts()[part][name] = module
    return [ComfyUIPatch(kohya_state_dict(file, torch.float32), strength) for strength, file in by_strength.items()]


def describe_fit(entry: StackEntry, found: dict[str, int], missing: dict[str, list[str]]) -> str:
    """A line of text: how many of the LoRA's modules each of ComfyUI's models has, and the first missing one.

    Raises ValueError if they have none.
    """
    name, lacking = entry.ref.name, [module for modules in missing.values() for module in modules]
    if lacking and len(lacking) == sum(found.values()):
        raise ValueError(
            f"LoRA {name}: none of its {len(lacking)} modules is in this MODEL or CLIP (first: {lacking[0]}): connect "
            "those of an SDXL checkpoint, or remove it from the stack"
        )
    parts = [f"{count - len(missing[part])} of {count} modules on {part}" for part, count in found.items() if count]
    words = f"; its new tokens {', '.join(entry.tokens)} need their embedding files in prompts" if entry.tokens else ""
    return (
        f"{name}: {', '.join(parts) or 'nothing for what is connected'}"
        + (f" (first missing: {lacking[0]})" if lacking else "")
        + words
    )
