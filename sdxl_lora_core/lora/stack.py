"""A stack of LoRA files with their strengths."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..files import file_sha256
from ..sdxl.blocks import read_block_values, value_for
from ..sdxl.family import Part
from ..text.embedding_files import Vectors
from .files import read_lora, settings_file
from .merge_into_weights import Strength
from .modules import AdapterModule, LoRAFile

# Number of LoRA files kept open. Their tensors are memory-mapped, and Windows does not replace a file that is mapped.
_FILES_KEPT = 0 if os.name == "nt" else 16


@dataclass(frozen=True)
class LoRARef:
    """A LoRA file with its strengths on the UNet and on the text encoders. `name` is for messages.

    `blocks` has factors on the strength for single blocks of the UNet: `mid_block=0, up_blocks.0=0.5`.
    """

    path: Path
    name: str
    strength_model: float
    strength_clip: float
    blocks: str = ""


@dataclass(frozen=True)
class StackEntry:
    """A LoRA of a stack with the SHA-256 of its file, which is read when its weights are first needed.

    `settings_sha256` is that of peft's adapter_config.json beside it, which also affects the weights. `in_memory` is a
    LoRA without a file.
    """

    ref: LoRARef
    sha256: str
    settings_sha256: str = ""
    in_memory: LoRAFile | None = field(default=None, compare=False)

    @property
    def content(self) -> str:
        """Identifies the weights: changes whenever they do."""
        return self.sha256 + self.settings_sha256

    @cached_property
    def file(self) -> LoRAFile:
        return self.in_memory or _read_once(self.ref.path, self.content)

    @cached_property
    def blocks(self) -> dict[str, float]:
        """Factors by block, inner blocks first. Raises ValueError for an unknown block."""
        return read_blocks_of(self.ref.name, self.ref.blocks)

    @property
    def identity(self) -> list[Any]:
        """Everything about the LoRA that affects an image, as JSON values; block factors only if there are any."""
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
        """The modules for `part`; none at strength 0, and none for the VAE, which LoRAs do not change."""
        return getattr(self.file, part) if part != "vae" and self.strength(part) else {}

    @property
    def tokens(self) -> Mapping[str, Vectors]:
        """The new tokens of the LoRA; none at text strength 0."""
        return self.file.tokens if self.ref.strength_clip else {}


def read_blocks_of(name: str, text: str) -> dict[str, float]:
    """Parses `mid_block=0, up_blocks.0=0.5` into factors by block. Raises ValueError naming the LoRA."""
    return read_block_values(f"LoRA {name}: blocks", text, -10, 10)


def entry_in_memory(name: str, file: LoRAFile) -> StackEntry:
    """A LoRA without a file as an entry at strength 1, identified by its tensors."""
    content = hashlib.sha256()
    for part, modules in file.parts().items():
        for path, module in sorted(modules.items()):
            content.update(f"{part}.{path} {module.alpha}".encode())
            for tensor in module.factors.values():
                content.update(tensor.float().contiguous().numpy().tobytes())
    return StackEntry(LoRARef(Path(), name, 1.0, 1.0), content.hexdigest(), in_memory=file)


@functools.lru_cache(maxsize=_FILES_KEPT)
def _read_once(path: Path, content: str) -> LoRAFile:
    return read_lora(path)


def open_stack(loras: Sequence[LoRARef], hash_memo: Path | None) -> tuple[StackEntry, ...]:
    """Opens LoRAs in their order, without those of strength 0.

    Raises FileNotFoundError naming a LoRA that is missing, ValueError for unknown blocks.
    """
    acting = [lora for lora in loras if lora.strength_model or lora.strength_clip]
    for lora in acting:
        if not lora.path.is_file():
            raise FileNotFoundError(f"LoRA {lora.name} does not exist: choose another or remove it from the stack")
        read_blocks_of(lora.name, lora.blocks)
    return tuple(_entry(lora, hash_memo) for lora in acting)


def _entry(lora: LoRARef, hash_memo: Path | None) -> StackEntry:
    beside = settings_file(lora.path)
    return StackEntry(lora, file_sha256(lora.path, hash_memo), file_sha256(beside, hash_memo) if beside else "")
