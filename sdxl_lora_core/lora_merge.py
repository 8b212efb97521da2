"""What a LoRA does to a weight, and doing it in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from .lora_modules import AdapterModule

Modules = Mapping[str, AdapterModule]


@dataclass(frozen=True)
class MergeReport:
    """The names of the modules that were changed, and of those that the model does not have."""

    applied: tuple[str, ...]
    missing: tuple[str, ...]


def merge_into(module: nn.Module, modules: Modules, strength: float) -> MergeReport:
    """merge_stack of one LoRA."""
    return merge_stack(module, [(modules, strength)])


@torch.no_grad()
def merge_stack(module: nn.Module, stack: Sequence[tuple[Modules, float]]) -> MergeReport:
    """W + strength * scale * change for each LoRA in turn, in fp32, in place, each weight rounded once.

    `module` is the part whose paths name the LoRA's modules. Linear and Conv2d can be changed.
    Raises ValueError naming the module whose shape does not fit; then nothing was changed.
    """
    names = list(dict.fromkeys(name for modules, _ in stack for name in modules))
    weights = {name: weight for name in names if (weight := _weight_of(module, name)) is not None}
    for name, weight in weights.items():
        for modules, _ in stack:
            if name in modules:
                _require_shape(name, modules[name], weight)
    for name, weight in weights.items():
        merged = weight.float()
        for modules, strength in stack:
            if name in modules:
                merged = _changed(merged, modules[name], strength)
        weight.copy_(merged)
    return MergeReport(tuple(weights), tuple(name for name in names if name not in weights))


def _weight_of(module: nn.Module, name: str) -> Tensor | None:
    """CLIP's text model lies within `text_model` or, from transformers 5.6 on, is the part itself."""
    for path in (name, name.removeprefix("text_model.")):
        try:
            found = module.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(found, (nn.Linear, nn.Conv2d)):
            return found.weight
    return None


def _require_shape(name: str, lora: AdapterModule, weight: Tensor) -> None:
    if _rows_and_columns(lora.shape) != _rows_and_columns(weight.shape):
        raise ValueError(
            f"the LoRA's {name} changes a weight of shape {list(lora.shape)}, the model's has {list(weight.shape)}:"
            " take a LoRA that was trained on a model of this size"
        )


def _rows_and_columns(shape: Sequence[int]) -> tuple[int, int]:
    """A kernel may be written flat, and a linear layer as a 1x1 kernel."""
    return shape[0], prod(shape[1:])


def _changed(weight: Tensor, lora: AdapterModule, strength: float) -> Tensor:
    """`weight` is fp32 and stays as it is."""
    change = lora.change(weight.device).reshape(weight.shape) * lora.scale
    if lora.dora_scale is None:
        return weight + strength * change
    return weight + strength * (_decomposed(weight + change, lora.dora_scale) - weight)


def _decomposed(weight: Tensor, dora_scale: Tensor) -> Tensor:
    """The directions of `weight` with the lengths of `dora_scale`, per output or, if it is [1, in, ...], per input."""
    axis = 0 if dora_scale.numel() == weight.shape[0] and dora_scale.shape[0] != 1 else 1
    others = [dim for dim in range(weight.dim()) if dim != axis]
    lengths = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    wanted = dora_scale.to(weight.device, torch.float32).reshape(lengths.shape)
    return weight * (wanted / lengths.clamp_min(torch.finfo(torch.float32).tiny))
