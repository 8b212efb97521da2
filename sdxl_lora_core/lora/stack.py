"""A stack of LoRA files, and the parts of a base with the stack merged into their weights."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..files import file_sha256, json_sha256
from ..sdxl.base import SDXLBase, load_part
from ..sdxl.blocks import read_block_values, value_for
from ..sdxl.loading import PARTS, Part
from ..sdxl.weight_reader import BaseWeights
from ..text.embedding_files import Vectors
from .files import read_lora, settings_file
from .merge_into_weights import Stack, Strength, changes_of, fitting_weights, merge_stack, merge_weight
from .modules import AdapterModule, LoRAFile

log = logging.getLogger("sdxl_lora")

# Of LoRAs that were read; their tensors are mapped, not copied, and Windows lets nobody replace a file that is mapped.
_FILES_KEPT = 0 if os.name == "nt" else 16
_WEIGHTS_AT_ONCE = 64  # read before the base's file is opened anew


@dataclass(frozen=True)
class LoRARef:
    """A LoRA file and how strongly it acts on the UNet and on the text encoders. `name` is for messages.

    `blocks` multiplies the strength in some blocks of the UNet: `mid_block=0, up_blocks.0=0.5`.
    """

    path: Path
    name: str
    strength_model: float
    strength_clip: float
    blocks: str = ""


@dataclass(frozen=True)
class StackEntry:
    """A LoRA of a stack with its SHA-256. The file is read when its weights are first asked for.

    `settings_sha256` is that of peft's settings beside it, which decide the weights as well.
    """

    ref: LoRARef
    sha256: str
    settings_sha256: str = ""

    @property
    def content(self) -> str:
        """Other content, other weights."""
        return self.sha256 + self.settings_sha256

    @cached_property
    def file(self) -> LoRAFile:
        return _read_once(self.ref.path, self.content)

    @cached_property
    def blocks(self) -> dict[str, float]:
        """Inner blocks first. Raises ValueError for what names no block of SDXL's UNet."""
        return read_blocks_of(self.ref.name, self.ref.blocks)

    @property
    def identity(self) -> list[Any]:
        """All that the LoRA does to an image, as JSON values: strengths by block only where there are any."""
        strengths = [self.content, float(self.ref.strength_model), float(self.ref.strength_clip)]
        return [*strengths, self.blocks] if self.blocks else strengths

    def strength(self, part: Part) -> float:
        return self.ref.strength_model if part == "unet" else self.ref.strength_clip

    def strength_by_module(self, part: Part) -> Strength:
        strength = self.strength(part)
        if part != "unet" or not self.blocks:
            return lambda _: strength
        return lambda module: strength * value_for(module, self.blocks, 1.0)

    def modules(self, part: Part) -> Mapping[str, AdapterModule]:
        """What acts on `part`: nothing at strength 0, and nothing for the VAE, which LoRAs leave alone."""
        return getattr(self.file, part) if part != "vae" and self.strength(part) else {}

    @property
    def tokens(self) -> Mapping[str, Vectors]:
        """The new tokens that it brings into prompts, whole or, at text strength 0, not at all."""
        return self.file.tokens if self.ref.strength_clip else {}


def read_blocks_of(name: str, text: str) -> dict[str, float]:
    """`mid_block=0, up_blocks.0=0.5` as factors of a LoRA's strength. Raises ValueError naming the LoRA."""
    return read_block_values(f"LoRA {name}: blocks", text, -10, 10)


@functools.lru_cache(maxsize=_FILES_KEPT)
def _read_once(path: Path, content: str) -> LoRAFile:
    return read_lora(path)


def open_stack(loras: Sequence[LoRARef], hash_memo: Path | None) -> tuple[StackEntry, ...]:
    """The stack in its order, without entries of strength 0.

    Raises FileNotFoundError naming a LoRA that is missing, ValueError for one whose blocks are none.
    """
    acting = [lora for lora in loras if lora.strength_model or lora.strength_clip]
    for lora in acting:
        if not lora.path.is_file():
            raise FileNotFoundError(f"LoRA {lora.name} does not exist: choose another or take it out of the stack")
        read_blocks_of(lora.name, lora.blocks)
    return tuple(_entry(lora, hash_memo) for lora in acting)


def _entry(lora: LoRARef, hash_memo: Path | None) -> StackEntry:
    beside = settings_file(lora.path)
    return StackEntry(lora, file_sha256(lora.path, hash_memo), file_sha256(beside, hash_memo) if beside else "")


def part_key(base: SDXLBase, part: Part, dtype: torch.dtype, stack: Sequence[StackEntry]) -> str:
    """Changes exactly when the part's weights do: a text strength matters only to files with text modules."""
    merged = [_mark(entry, part) for entry in stack if entry.modules(part)]
    return json_sha256([dict(base.part_hashes)[part], str(dtype), merged])


def _mark(entry: StackEntry, part: Part) -> list[Any]:
    mark = [entry.content, float(entry.strength(part))]
    return [*mark, entry.blocks] if part == "unet" and entry.blocks else mark


@dataclass(frozen=True)
class _Merged:
    """What a loaded part holds: of which weights, and by name what was merged into each (file and strength)."""

    source: tuple[str, torch.dtype]
    changes: Mapping[str, Sequence[tuple[str, float]]]
    fit: tuple[str, ...]


_MERGED: WeakKeyDictionary[nn.Module, _Merged] = WeakKeyDictionary()


def load_merged(base: SDXLBase, part: Part, dtype: torch.dtype, stack: Sequence[StackEntry]) -> nn.Module:
    """The part on the CPU with the stack in its weights, in the stack's order, each weight rounded once.

    Raises ValueError for a LoRA of which nothing fits; what does not fit of the others is warned about.
    """
    module = load_part(base, part, dtype)
    _MERGED[module] = _Merged(_source(base, part, dtype), {}, ())
    if not restack(module, base, part, dtype, stack):  # its file has other matrices: from those that were rounded once
        acting = [entry for entry in stack if entry.modules(part)]
        report = merge_stack(module, _layers(acting, part))
        fit = _fit(acting, part, set(report.applied))
        _MERGED[module] = _Merged(_source(base, part, dtype), _changes(acting, part, report.applied), fit)
    return module


def restack(module: nn.Module, base: SDXLBase, part: Part, dtype: torch.dtype, stack: Sequence[StackEntry]) -> bool:
    """Gives a part from load_merged another stack, wherever it lies, with the same bits as loading it anew.

    False, and nothing is done, where restacking says that it is not possible. Raises as it does.
    """
    merge = restacking(module, base, part, dtype, stack)
    if merge:
        merge()
    return merge is not None


def restacking(
    module: nn.Module, base: SDXLBase, part: Part, dtype: torch.dtype, stack: Sequence[StackEntry]
) -> Callable[[], None] | None:
    """What turns a part from load_merged into one with another stack. Until it is called nothing is changed.

    Only weights whose changes differ are read again, from the base's file at its own precision, and merged. None where
    that is not possible: the part is another base's, or its file has other matrices. Raises ValueError as load_merged.
    """
    held = _MERGED.get(module)
    if held is None or held.source != _source(base, part, dtype):
        return None
    acting = [entry for entry in stack if entry.modules(part)]
    layers = _layers(acting, part)
    names = dict.fromkeys([*(name for modules, _ in layers for name in modules), *held.changes])
    weights = fitting_weights(module, [*names], layers)
    wanted = _changes(acting, part, weights)
    stale = [name for name in weights if held.changes.get(name, []) != wanted.get(name, [])]
    originals = BaseWeights(base, part)
    if not originals.has(stale):
        return None
    fit = _fit(acting, part, set(weights))

    @torch.no_grad()
    def merge() -> None:
        rest = iter(stale)
        while lot := list(islice(rest, _WEIGHTS_AT_ONCE)):
            with originals.opened():
                for name in lot:
                    merge_weight(weights[name], originals.read(name), changes_of(name, layers))
        _MERGED[module] = _Merged(held.source, wanted, fit)

    return merge


def fit_of(module: nn.Module | None) -> tuple[str, ...]:
    """For each LoRA in what is loaded how many of its modules the part has, in a line for a person."""
    if module is None:
        return ()
    return tuple(line for part in module.modules() if part in _MERGED for line in _MERGED[part].fit)


def _source(base: SDXLBase, part: Part, dtype: torch.dtype) -> tuple[str, torch.dtype]:
    return dict(base.part_hashes)[part], dtype


def _layers(acting: Sequence[StackEntry], part: Part) -> Stack:
    return [(entry.modules(part), entry.strength_by_module(part)) for entry in acting]


def _changes(acting: Sequence[StackEntry], part: Part, names: Iterable[str]) -> dict[str, Sequence[tuple[str, float]]]:
    changes: dict[str, list[tuple[str, float]]] = {name: [] for name in names}
    for entry in acting:
        strength = entry.strength_by_module(part)
        for name in entry.modules(part):
            if name in changes and strength(name):
                changes[name].append((entry.content, strength(name)))
    return {name: change for name, change in changes.items() if change}


def _fit(acting: Sequence[StackEntry], part: Part, present: set[str]) -> tuple[str, ...]:
    """Raises ValueError for a LoRA of which nothing is present, warns of one of which something is not.

    Of a LoRA for the UNet text modules may be missing: some files have a matrix more than the encoders.
    """
    lines = []
    for entry in acting:
        name, modules = entry.ref.name, entry.modules(part)
        missing = [module for module in modules if module not in present]
        if len(missing) == len(modules) and (part == "unet" or not entry.modules("unet")):
            raise ValueError(
                f"LoRA {name}: none of its {len(modules)} {part} modules is in this base (first: {missing[0]}): "
                "take it out of the stack, or take the base it was made for"
            )
        lines.append(f"LoRA {name}: {len(modules) - len(missing)} of {len(modules)} {part} modules are in this base")
        if missing:
            lines[-1] += f" (first missing: {missing[0]})"
        unknown = entry.file.unknown if part == next(filter(entry.modules, PARTS)) else ()  # said once
        if unknown:
            lines[-1] += f"; {len(unknown)} keys of its file are not understood (first: {unknown[0]})"
        if missing or unknown:
            log.warning(lines[-1])
    return tuple(lines)
