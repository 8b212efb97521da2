"""Parts of a base with a stack of LoRAs merged into their weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch

from ..files import json_sha256
from ..runtime.loaded_parts import Loaded
from ..sdxl.base import SDXLBase, load_part
from ..sdxl.family import PARTS, Part
from ..sdxl.weight_reader import BaseWeights
from .merge_into_weights import Stack, changes_of, fitting_weights, merge_stack, merge_weight
from .stack import StackEntry

log = logging.getLogger("sdxl_lora")

_WEIGHTS_AT_ONCE = 64  # read before the base's file is opened again

Changes = Mapping[str, Sequence[tuple[str, float]]]  # by weight, the merged LoRAs' contents and strengths


@dataclass(frozen=True)
class MergedLoRAs:
    """The state of a loaded part: its original weights, what was merged into each of them, and how the LoRAs fit.

    `fit` has a line for each LoRA: how many of its modules the part has.
    """

    source: tuple[str, torch.dtype]
    changes: Changes
    fit: tuple[str, ...]


@dataclass(frozen=True)
class StackedPart:
    """A part of a base, with `stack` to be merged into its weights at precision `dtype`."""

    base: SDXLBase
    part: Part
    dtype: torch.dtype
    stack: Sequence[StackEntry]

    @property
    def key(self) -> str:
        """Changes exactly when the weights do: a text strength matters only to files with text modules."""
        return json_sha256([self.source[0], str(self.dtype), [self._mark(entry) for entry in self._acting]])

    @property
    def source(self) -> tuple[str, torch.dtype]:
        return dict(self.base.part_hashes)[self.part], self.dtype

    @cached_property
    def _acting(self) -> list[StackEntry]:
        return [entry for entry in self.stack if entry.modules(self.part)]

    @cached_property
    def _layers(self) -> Stack:
        return [(entry.modules(self.part), entry.strength_by_module(self.part)) for entry in self._acting]

    def load(self) -> Loaded:
        """The part on the CPU with the LoRAs merged in the order of the stack, each weight rounded once.

        Raises ValueError for a LoRA of which no module fits; modules that do not fit of the others are logged.
        """
        loaded = Loaded(load_part(self.base, self.part, self.dtype), MergedLoRAs(self.source, {}, ()))
        if merged := self.restack(loaded):
            return merged
        # The file stores a matrix in another layout: merge into the loaded weights.
        report = merge_stack(loaded.module, self._layers)
        fit = self._fit(set(report.applied))
        return Loaded(loaded.module, MergedLoRAs(self.source, self._changes(report.applied), fit))

    def restack(self, loaded: Loaded) -> Loaded | None:
        """Changes a part from `load` to this stack in place, with the same bits as loading it again.

        Returns None, without any change, where `restacking` does. Raises as it does.
        """
        merge = self.restacking(loaded)
        return merge() if merge else None

    def restacking(self, loaded: Loaded) -> Callable[[], Loaded] | None:
        """A function that changes a part from `load` to this stack. Nothing is changed before it is called.

        It reads only weights whose changes differ from the base's file, at its own precision, and merges them. None if
        that is impossible: the part belongs to another base, or its file has a matrix in another layout. Raises
        ValueError as `load` does.
        """
        held = loaded.state
        if not isinstance(held, MergedLoRAs) or held.source != self.source:
            return None
        names = dict.fromkeys([*(name for modules, _ in self._layers for name in modules), *held.changes])
        weights = fitting_weights(loaded.module, [*names], self._layers)
        wanted = self._changes(weights)
        stale = [name for name in weights if held.changes.get(name, []) != wanted.get(name, [])]
        originals = BaseWeights(self.base, self.part)
        if not originals.has(stale):
            return None
        fit = self._fit(set(weights))

        @torch.no_grad()
        def merge() -> Loaded:
            remaining = iter(stale)
            while chunk := list(islice(remaining, _WEIGHTS_AT_ONCE)):
                with originals.opened():
                    for name in chunk:
                        merge_weight(weights[name], originals.read(name), changes_of(name, self._layers))
            return Loaded(loaded.module, MergedLoRAs(self.source, wanted, fit))

        return merge

    def _mark(self, entry: StackEntry) -> list[Any]:
        mark = [entry.content, float(entry.strength(self.part))]
        return [*mark, entry.blocks] if self.part == "unet" and entry.blocks else mark

    def _changes(self, names: Iterable[str]) -> Changes:
        changes: dict[str, list[tuple[str, float]]] = {name: [] for name in names}
        for entry, (modules, strength) in zip(self._acting, self._layers, strict=True):
            for name in modules:
                if name in changes and strength(name):
                    changes[name].append((entry.content, strength(name)))
        return {name: change for name, change in changes.items() if change}

    def _fit(self, present: set[str]) -> tuple[str, ...]:
        """A line for each LoRA. Raises ValueError for a LoRA of which nothing is present, logs what is missing."""
        return tuple(self._fit_of(entry, present) for entry in self._acting)

    def _fit_of(self, entry: StackEntry, present: set[str]) -> str:
        """A LoRA for the UNet may lack text modules: some files have a matrix more than the encoders."""
        name, modules, part = entry.ref.name, entry.modules(self.part), self.part
        missing = [module for module in modules if module not in present]
        if len(missing) == len(modules) and (part == "unet" or not entry.modules("unet")):
            raise ValueError(
                f"LoRA {name}: none of its {len(modules)} {part} modules is in this base (first: {missing[0]}): "
                "remove it from the stack, or use the base it was made for"
            )
        line = f"LoRA {name}: {len(modules) - len(missing)} of {len(modules)} {part} modules are in this base"
        if missing:
            line += f" (first missing: {missing[0]})"
        unknown = entry.file.unknown if part == next(filter(entry.modules, PARTS)) else ()  # reported once
        if unknown:
            line += f"; {len(unknown)} keys of its file are unknown (first: {unknown[0]})"
        if missing or unknown:
            log.warning(line)
        return line
