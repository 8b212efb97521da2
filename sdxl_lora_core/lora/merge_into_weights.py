"""Merges LoRAs into weights in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from .modules import AdapterModule, LoRAModule, row_norms

Modules = Mapping[str, AdapterModule]
Strength = Callable[[str], float]  # by the path of the changed weight
Stack = Sequence[tuple[Modules, Strength]]
MERGE_VERSION = 2  # part of image keys: raised when the same LoRAs give different weights
_LAYERS = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm, nn.Embedding)
_NUMBERS_AT_ONCE = 2**19  # elements of a weight that fit into a CPU's cache between reading and rounding


@dataclass(frozen=True)
class MergeReport:
    """The names of the modules that were changed, and of those that the model does not have."""

    applied: tuple[str, ...]
    missing: tuple[str, ...]


def merge_into(module: nn.Module, modules: Modules, strength: float) -> MergeReport:
    """merge_stack of one LoRA with the same strength for all modules."""
    return merge_stack(module, [(modules, lambda _: strength)])


@torch.no_grad()
def merge_stack(module: nn.Module, stack: Stack) -> MergeReport:
    """W + strength * scale * change for each LoRA in turn, in fp32, in place, each weight rounded once.

    `module` is the part to which the paths of the LoRA's modules refer; a path that ends in `.bias` is a bias.
    Raises ValueError naming a module whose shape does not fit, before any weight is changed.
    """
    names = list(dict.fromkeys(name for modules, _ in stack for name in modules))
    weights = fitting_weights(module, names, stack)
    for name, weight in weights.items():
        merge_weight(weight, weight, changes_of(name, stack))
    return MergeReport(tuple(weights), tuple(name for name in names if name not in weights))


def fitting_weights(module: nn.Module, names: Sequence[str], stack: Stack) -> dict[str, Tensor]:
    """The weights of `names` that the module has. Raises ValueError as merge_stack does."""
    weights = {name: weight for name in names if (weight := _weight_of(module, name)) is not None}
    for name, weight in weights.items():
        for modules, _ in stack:
            if name in modules:
                _require_shape(name, modules[name], weight)
    return weights


def changes_of(name: str, stack: Stack) -> list[tuple[AdapterModule, float]]:
    """The changes of a weight in the stack's order, without those of strength 0."""
    found = [(modules[name], strength(name)) for modules, strength in stack if name in modules]
    return [(change, strength) for change, strength in found if strength]


def merge_weight(weight: Tensor, original: Tensor, changes: Sequence[tuple[AdapterModule, float]]) -> None:
    """Writes `original` with the changes to `weight`, computed on the device of `original`. Both may be one tensor."""
    if not changes:
        weight.copy_(original)
    elif all(isinstance(change, LoRAModule) and not change.is_dora for change, _ in changes):
        _add_products(weight, original, changes)
    else:
        merged = original.float()
        for change, strength in changes:
            merged = _changed(merged, change, strength)
        weight.copy_(merged)


def _add_products(weight: Tensor, original: Tensor, changes: Sequence[tuple[AdapterModule, float]]) -> None:
    """W + [s1 B1, s2 B2, ...] [A1; A2; ...], which reads and writes W once for any number of LoRAs."""
    loras = [(change, strength) for change, strength in changes if isinstance(change, LoRAModule)]

    def moved(factor: Tensor) -> Tensor:
        return factor.detach().to(original.device, torch.float32).flatten(1)

    up = torch.cat([moved(lora.up) * (strength * lora.scale) for lora, strength in loras], dim=1)
    down = torch.cat([moved(lora.down) for lora, _ in loras])
    if original.dim() > 2:
        weight.copy_(torch.addmm(original.float().flatten(1), up, down).reshape(original.shape))
        return
    rows = max(1, _NUMBERS_AT_ONCE // original.shape[1])
    for first in range(0, len(original), rows):
        some = slice(first, first + rows)
        weight[some].copy_(original[some].float().addmm_(up[some], down))


def _weight_of(module: nn.Module, name: str) -> Tensor | None:
    """CLIP's text model is in `text_model` or, from transformers 5.6 on, is the part itself."""
    path, leaf = (name.removesuffix(".bias"), "bias") if name.endswith(".bias") else (name, "weight")
    for own in (path, path.removeprefix("text_model.")):
        try:
            found = module.get_submodule(own)
        except AttributeError:
            continue
        if isinstance(found, _LAYERS):
            return getattr(found, leaf, None)
    return None


def _require_shape(name: str, lora: AdapterModule, weight: Tensor) -> None:
    if _rows_and_columns(lora.shape) != _rows_and_columns(weight.shape):
        raise ValueError(
            f"the LoRA's {name} changes a weight of shape {list(lora.shape)}, the model's has {list(weight.shape)}:"
            " use a LoRA that was trained on a model of this size"
        )


def _rows_and_columns(shape: Sequence[int]) -> tuple[int, int]:
    """Ignores that kernels may be stored flat, and linear layers as 1x1 kernels."""
    return shape[0], prod(shape[1:])


def _changed(weight: Tensor, lora: AdapterModule, strength: float) -> Tensor:
    """The changed weight, fp32 as `weight`, which is not modified."""
    change = lora.change(weight.device).reshape(weight.shape) * lora.scale
    factor = _dora_factor(weight, weight + change, lora)
    if factor is None:
        return weight + strength * change
    return weight + strength * ((weight + change) * factor - weight)


def _dora_factor(weight: Tensor, changed: Tensor, lora: AdapterModule) -> Tensor | None:
    """The factor that gives the changed weight a DoRA's norms, or None; see modules.py for its two forms."""
    magnitude = lora.magnitude if isinstance(lora, LoRAModule) else None
    if magnitude is not None:
        return _like(row_norms(changed), magnitude) / row_norms(changed)
    if lora.dora_scale is None:
        return None
    if lora.dora_scale.numel() == weight.shape[0] and lora.dora_scale.shape[0] != 1:
        return _like(row_norms(weight), lora.dora_scale) / row_norms(weight)
    columns = row_norms(changed.transpose(0, 1)).transpose(0, 1)
    return _like(columns, lora.dora_scale) / columns


def _like(norms: Tensor, scale: Tensor) -> Tensor:
    return scale.to(norms).reshape(norms.shape)
