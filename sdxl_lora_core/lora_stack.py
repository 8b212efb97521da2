"""A stack of LoRA files and the parts of a base with the stack merged into their weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from . import base_model
from .base_model import SDXLBase
from .base_parts import Part
from .files import file_sha256, json_sha256
from .lora_files import AdapterModule, LoRAFile, merge_stack, read_lora
from .new_tokens import Vectors

log = logging.getLogger("sdxl_lora")


@dataclass(frozen=True)
class LoRARef:
    """A LoRA file and how strongly it acts on the UNet and on the text encoders. `name` is for messages."""

    path: Path
    name: str
    strength_model: float
    strength_clip: float


@dataclass(frozen=True)
class StackEntry:
    """A LoRA of a stack with its SHA-256. The file is read when its weights are first asked for."""

    ref: LoRARef
    sha256: str

    @cached_property
    def file(self) -> LoRAFile:
        return read_lora(self.ref.path)

    def strength(self, part: Part) -> float:
        return self.ref.strength_model if part == "unet" else self.ref.strength_clip

    def modules(self, part: Part) -> Mapping[str, AdapterModule]:
        """What acts on `part`: nothing at strength 0, and nothing for the VAE, which LoRAs leave alone."""
        return getattr(self.file, part) if part != "vae" and self.strength(part) else {}

    @property
    def tokens(self) -> Mapping[str, Vectors]:
        """The new tokens that it brings into prompts, whole or, at text strength 0, not at all."""
        return self.file.tokens if self.ref.strength_clip else {}


def open_stack(loras: Sequence[LoRARef], hash_memo: Path | None) -> tuple[StackEntry, ...]:
    """The stack in its order, without entries of strength 0. Raises FileNotFoundError naming a LoRA that is missing."""
    acting = [lora for lora in loras if lora.strength_model or lora.strength_clip]
    for lora in acting:
        if not lora.path.is_file():
            raise FileNotFoundError(f"LoRA {lora.name} does not exist: choose another or take it out of the stack")
    return tuple(StackEntry(lora, file_sha256(lora.path, hash_memo)) for lora in acting)


def part_key(base: SDXLBase, part: Part, dtype: torch.dtype, stack: Sequence[StackEntry]) -> str:
    """Changes exactly when the part's weights do: a text strength matters only to files with text modules."""
    merged = [[entry.sha256, float(entry.strength(part))] for entry in stack if entry.modules(part)]
    return json_sha256([dict(base.part_hashes)[part], str(dtype), merged])


def load_merged(base: SDXLBase, part: Part, dtype: torch.dtype, stack: Sequence[StackEntry]) -> nn.Module:
    """The part on the CPU with the stack in its weights, in the stack's order, each weight rounded once.

    Raises ValueError for a LoRA of which nothing fits; what does not fit of the others is warned about.
    """
    module = base_model.load_part(base, part, dtype)
    acting = [entry for entry in stack if entry.modules(part)]
    report = merge_stack(module, [(entry.modules(part), entry.strength(part)) for entry in acting])
    for entry in acting:
        _check_fit(entry, part, [name for name in entry.modules(part) if name in report.missing])
    return module


def _check_fit(entry: StackEntry, part: Part, missing: Sequence[str]) -> None:
    name, found = entry.ref.name, len(entry.modules(part))
    if len(missing) == found:
        raise ValueError(
            f"LoRA {name}: none of its {found} {part} modules is in this base (first: {missing[0]}): "
            "take it out of the stack, or take the base it was made for"
        )
    if missing:
        fitting = f"{found - len(missing)} of {found}"
        log.warning("LoRA %s: %s %s modules are in this base (first missing: %s)", name, fitting, part, missing[0])
