"""Prompt embeddings for generation. If no LoRA changes the text encoders, they are cached and shared with training."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError

from ..files import json_sha256
from ..lora.stack import StackEntry
from ..lora.stacked_part import MergedLoRAs, StackedPart
from ..runtime.loaded_parts import Loaded, LoadedParts, PartRequest
from ..sdxl.base import SDXLBase, load_tokenizers
from ..sdxl.family import ENCODERS
from ..text.prompt_cache import PromptKeys, load_prompt, store_prompt
from ..text.text_model import TextEmbeds, TextModel
from .prompt_reader import PromptReader

log = logging.getLogger("sdxl_lora")

TEXT_PART = "text_encoders"  # the name of all together for the owner of loaded weights


class EncodedPrompts(NamedTuple):
    """The embeddings by prompt, and a line for each LoRA merged into the encoders; none if all was cached."""

    embeds: dict[str, TextEmbeds]
    lora_fit: tuple[str, ...]


@dataclass(frozen=True)
class TextPhase:
    """The first phase of generation, the only one that needs the text encoders.

    `prompts` is the folder of cached prompt embeddings, None for no cache.
    """

    reader: PromptReader
    base: SDXLBase
    stack: Sequence[StackEntry]
    parts: LoadedParts
    dtype: torch.dtype
    offload: bool | None
    prompts: Path | None

    def encode(self, texts: Iterable[str]) -> EncodedPrompts:
        """Encodes each text alone, so that its embedding does not depend on the others."""
        files = {text: self._file(text) for text in texts}
        known = {text: embeds for text, file in files.items() if (embeds := _read(file)) is not None}
        encoded, fit = self._run_encoders([text for text in files if text not in known])
        _write({file: encoded[text] for text, file in files.items() if file is not None and text in encoded})
        return EncodedPrompts(known | encoded, fit)

    def _file(self, text: str) -> Path | None:
        if self.prompts is None or any(map(_changes_text, self.stack)):
            return None
        keys = PromptKeys(self.base, self.dtype, self.parts.device)
        return keys.file(self.prompts, text, reading=self.reader.facts(text))

    def _run_encoders(self, texts: Sequence[str]) -> EncodedPrompts:
        if not texts:
            return EncodedPrompts({}, ())
        tokens = {name: vectors for entry in self.stack for name, vectors in entry.tokens.items()}
        request = PartRequest(TEXT_PART, self._key(), self._load, self._restack, offload=self.offload)
        with self.parts.phase(request) as loaded:
            embeds = {text: loaded.module(self.reader.parse(text).reading, tokens) for text in texts}
            merged: tuple[MergedLoRAs, ...] = loaded.state
            return EncodedPrompts(embeds, tuple(line for state in merged for line in state.fit))

    @cached_property
    def _encoders(self) -> list[StackedPart]:
        return [StackedPart(self.base, part, self.dtype, self.stack) for part in self.base.family.encoders]

    def _key(self) -> str:
        return json_sha256([[encoder.key for encoder in self._encoders], *self._tokenizers()])

    def _tokenizers(self) -> tuple[str, ...]:
        return tuple(dict(self.base.part_hashes)[name] for name in self.base.family.tokenizers)

    def _load(self) -> Loaded:
        loaded = [encoder.load() for encoder in self._encoders]
        encoders = [part.module for part in loaded]
        model = TextModel(load_tokenizers(self.base), encoders, self._tokenizers(), self.base.family)
        return Loaded(model, tuple(part.state for part in loaded))

    def _restack(self, loaded: Loaded) -> Loaded | None:
        """Changes all encoders, or none."""
        model = loaded.module
        if not isinstance(model, TextModel) or model.tokenizer_hashes != self._tokenizers():
            return None
        held = [Loaded(encoder, state) for encoder, state in zip(model.encoders, loaded.state, strict=True)]
        merges = [encoder.restacking(part) for encoder, part in zip(self._encoders, held, strict=True)]
        if not all(merges):
            return None
        return Loaded(model, tuple(merge().state for merge in merges if merge))


def _changes_text(entry: StackEntry) -> bool:
    return bool(entry.tokens) or any(entry.modules(part) for part in ENCODERS)


def _read(file: Path | None) -> TextEmbeds | None:
    if file is None or not file.is_file():
        return None
    try:
        hidden, pooled = load_prompt(file)
    except (OSError, SafetensorError, KeyError):
        log.warning("the cached prompt embedding %s is damaged and will be computed again", file.name)
        return None
    return TextEmbeds(hidden[None], pooled[None])


def _write(encoded: Mapping[Path, TextEmbeds]) -> None:
    try:
        for file, embeds in encoded.items():
            store_prompt(file, embeds.hidden[0], embeds.pooled[0])
    except OSError as error:
        log.warning("prompt embeddings could not be stored: %s", error)
