"""Prompt embeddings for generation. Where no LoRA touches the text encoders they are on disk, shared with training."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from . import base_model
from .base_model import SDXLBase
from .base_parts import Part
from .files import write_atomic
from .loaded_parts import LoadedParts
from .lora_stack import StackEntry, load_merged, part_key
from .precompute import load_prompt, prompt_file
from .prompts import encode_prompt_sdxl

log = logging.getLogger("sdxl_lora")

ENCODERS: tuple[Part, Part] = ("text_encoder", "text_encoder_2")


class TextEmbeds(NamedTuple):
    """One prompt: `hidden` [1, 77, C] and `pooled` [1, P], on the CPU."""

    hidden: Tensor
    pooled: Tensor


@dataclass(frozen=True)
class TextPhase:
    """The first phase of generation: the only one that holds the text encoders. `cache` is the folder of prompts/."""

    base: SDXLBase
    stack: Sequence[StackEntry]
    parts: LoadedParts
    dtype: torch.dtype
    offload: bool | None
    cache: Path | None

    def encode(self, texts: Iterable[str]) -> dict[str, TextEmbeds]:
        """Each text encoded alone, so that its embedding does not depend on the others."""
        files = {text: self._file(text) for text in texts}
        known = {text: embeds for text, file in files.items() if (embeds := _read(file)) is not None}
        made = self._run_encoders([text for text in files if text not in known])
        for text, embeds in made.items():
            _write(files[text], embeds)
        return known | made

    def _file(self, text: str) -> Path | None:
        if self.cache is None or any(entry.modules(part) for entry in self.stack for part in ENCODERS):
            return None
        return prompt_file(self.base, text, self.cache, self.dtype)

    def _run_encoders(self, texts: Sequence[str]) -> dict[str, TextEmbeds]:
        if not texts:
            return {}
        tokenizers = base_model.load_tokenizers(self.base)
        encoders = [
            self.parts.borrow(
                part,
                part_key(self.base, part, self.dtype, self.stack),
                lambda part=part: load_merged(self.base, part, self.dtype, self.stack),
            )
            for part in ENCODERS
        ]
        embeds = {text: encode_prompt_sdxl([text], tokenizers, encoders) for text in texts}
        for part in ENCODERS:
            self.parts.rest(part, self.offload)
        return {text: TextEmbeds(hidden.cpu(), pooled.cpu()) for text, (hidden, pooled) in embeds.items()}


def _read(file: Path | None) -> TextEmbeds | None:
    if file is None or not file.is_file():
        return None
    try:
        hidden, pooled = load_prompt(file)
    except (OSError, SafetensorError, KeyError):
        log.warning("the cached prompt %s is damaged and will be made again", file.name)
        return None
    return TextEmbeds(hidden[None], pooled[None])


def _write(file: Path | None, embeds: TextEmbeds) -> None:
    if file is None:
        return
    tensors = {"embeds": embeds.hidden[0].contiguous(), "pooled": embeds.pooled[0].contiguous()}
    try:
        write_atomic(file, lambda temporary: save_file(tensors, temporary))
    except OSError as error:
        log.warning("a prompt embedding could not be kept: %s", error)
