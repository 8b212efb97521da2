"""A stack in the form that ComfyUI's own loader takes, however its files are spelled: core drops some spellings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..sdxl.loading import Part
from .modules import LoRAFile, LoRAModule
from .stack import StackEntry
from .writing import kohya_state_dict


class CoreChange(NamedTuple):
    """Tensors by kohya's keys, float32, and the strength that all of them act at."""

    tensors: dict[str, Tensor]
    strength: float


def core_changes(entry: StackEntry, parts: Sequence[Part]) -> list[CoreChange]:
    """What a LoRA does to some parts. Modules of one strength go together: strengths by block make several.

    Raises ValueError for a DoRA in peft's form, whose lengths core measures otherwise.
    """
    by_strength: dict[float, LoRAFile] = {}
    for part in parts:
        strength_of = entry.strength_by_module(part)
        for name, module in entry.modules(part).items():
            if isinstance(module, LoRAModule) and module.magnitude is not None:
                raise ValueError(
                    f"LoRA {entry.ref.name} is a DoRA in peft's form, which core's MODEL cannot take: save it in the "
                    "kohya format, or generate with SDXL Generate (cached)"
                )
            if strength := strength_of(name):
                by_strength.setdefault(strength, LoRAFile()).parts()[part][name] = module
    return [CoreChange(kohya_state_dict(file, torch.float32), strength) for strength, file in by_strength.items()]


def describe_fit(entry: StackEntry, found: dict[str, int], missing: dict[str, list[str]]) -> str:
    """A line for a person: by part how many modules the LoRA has, and which of them core's models do not have.

    Raises ValueError if they have none of them.
    """
    name, lacking = entry.ref.name, [module for modules in missing.values() for module in modules]
    if lacking and len(lacking) == sum(found.values()):
        raise ValueError(
            f"LoRA {name}: none of its {len(lacking)} modules is in this MODEL or CLIP (first: {lacking[0]}): connect "
            "those of an SDXL checkpoint, or take it out of the stack"
        )
    parts = [f"{count - len(missing[part])} of {count} modules on {part}" for part, count in found.items() if count]
    words = f"; its new words {', '.join(entry.tokens)} need their embedding files in prompts" if entry.tokens else ""
    return (
        f"{name}: {', '.join(parts) or 'nothing for what is connected'}"
        + (f" (first missing: {lacking[0]})" if lacking else "")
        + words
    )
