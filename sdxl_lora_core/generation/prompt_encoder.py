"""Prompt embeddings for generation. Where no LoRA touches the text encoders they are on disk, shared with training."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from torch import nn

from ..files import json_sha256
from ..lora.stack import StackEntry, load_merged, part_key, restacking
from ..runtime.loaded_parts import LoadedParts
from ..sdxl.base import TOKENIZERS, SDXLBase, load_tokenizers
from ..sdxl.loading import ENCODERS
from ..text.prompt_cache import load_prompt, prompt_file, store_prompt
from ..text.text_model import TextEmbeds, TextModel
from .prompt_reader import PromptReader

log = logging.getLogger("sdxl_lora")

TEXT_PART = "text_encoders"  # what the owner of loaded weights knows both of them as


@dataclass(frozen=True)
class TextPhase:
    """The first phase of generation: the only one that holds the text encoders. `cache` is the folder of prompts/."""

    reader: PromptReader
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
        _write({file: made[text] for text, file in files.items() if file is not None and text in made})
        return known | made

    def _file(self, text: str) -> Path | None:
        if self.cache is None or any(map(_changes_text, self.stack)):
            return None
        return prompt_file(self.base, text, self.cache, self.dtype, self.parts.device, reading=self.reader.facts(text))

    def _run_encoders(self, texts: Sequence[str]) -> dict[str, TextEmbeds]:
        if not texts:
            return {}
        words = {name: vectors for entry in self.stack for name, vectors in entry.tokens.items()}
        with self.parts.phase(TEXT_PART, self._key(), self._load, self.offload, self._restack) as text_model:
            return {text: text_model(self.reader.read(text), words) for text in texts}

    def _key(self) -> str:
        encoders = [part_key(self.base, part, self.dtype, self.stack) for part in ENCODERS]
        return json_sha256([encoders, *self._tokenizers()])

    def _tokenizers(self) -> tuple[str, ...]:
        return tuple(dict(self.base.part_hashes)[name] for name in TOKENIZERS)

    def _load(self) -> nn.Module:
        encoders = [load_merged(self.base, part, self.dtype, self.stack) for part in ENCODERS]
        return TextModel(load_tokenizers(self.base), encoders, self._tokenizers())

    def _restack(self, held: nn.Module) -> bool:
        model = cast(TextModel, held)
        if model.tokenizer_hashes != self._tokenizers():
            return False
        pairs = zip(ENCODERS, model.encoders, strict=True)
        found = (restacking(encoder, self.base, part, self.dtype, self.stack) for part, encoder in pairs)
        merges = [merge for merge in found if merge]
        if len(merges) < len(ENCODERS):
            return False
        for merge in merges:
            merge()
        return True


def _changes_text(entry: StackEntry) -> bool:
    return bool(entry.tokens) or any(entry.modules(part) for part in ENCODERS)


def _read(file: Path | None) -> TextEmbeds | None:
    if file is None or not file.is_file():
        return None
    try:
        hidden, pooled = load_prompt(file)
    except (OSError, SafetensorError, KeyError):
        log.warning("the cached prompt %s is damaged and will be made again", file.name)
        return None
    return TextEmbeds(hidden[None], pooled[None])


def _write(made: Mapping[Path, TextEmbeds]) -> None:
    try:
        for file, embeds in made.items():
            store_prompt(file, embeds.hidden[0], embeds.pooled[0])
    except OSError as error:
        log.warning("prompt embeddings could not be kept: %s", error)
