"""Prompt embeddings for generation. Where no LoRA touches the text encoders they are on disk, shared with training."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from . import base_model
from .base_model import SDXLBase
from .base_parts import ENCODERS
from .files import json_sha256
from .loaded_parts import LoadedParts
from .lora_stack import StackEntry, load_merged, part_key
from .new_tokens import Vectors, add_tokens
from .precompute import load_prompt, prompt_file, store_prompt
from .prompts import TokenIds, encode_prompt_sdxl, truncated_words

log = logging.getLogger("sdxl_lora")

TEXT_PART = "text_encoders"  # what the owner of loaded weights knows both of them as


class TextEmbeds(NamedTuple):
    """One prompt: `hidden` [1, 77, C] and `pooled` [1, P], on the CPU."""

    hidden: Tensor
    pooled: Tensor


class TextModel(nn.Module):
    """Both text encoders with their tokenizers, whose vocabulary takes as long to read as an encoder."""

    def __init__(self, tokenizers: Sequence[Any], encoders: Sequence[nn.Module], tokens: Mapping[str, Vectors]) -> None:
        super().__init__()
        self.tokenizers = tokenizers
        self.encoders = nn.ModuleList(encoders)
        self.token_ids: TokenIds = {}
        for part, tokenizer, encoder in zip(ENCODERS, tokenizers, encoders, strict=True):
            if tokens:
                _, self.token_ids = add_tokens(encoder, tokenizer, {name: tokens[name][part] for name in tokens})

    def forward(self, text: str) -> TextEmbeds:
        if unseen := truncated_words(text, self.tokenizers[0], 1, self.token_ids):
            log.warning("the prompt is longer than CLIP's 77 tokens and its end is not seen: %s", unseen)
        hidden, pooled = encode_prompt_sdxl([text], self.tokenizers, list(self.encoders), 1, self.token_ids)
        return TextEmbeds(hidden.cpu(), pooled.cpu())


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
        _write({file: made[text] for text, file in files.items() if file is not None and text in made})
        return known | made

    def _file(self, text: str) -> Path | None:
        if self.cache is None or any(map(_changes_text, self.stack)):
            return None
        return prompt_file(self.base, text, self.cache, self.dtype, self.parts.device)

    def _run_encoders(self, texts: Sequence[str]) -> dict[str, TextEmbeds]:
        if not texts:
            return {}
        with self.parts.phase(TEXT_PART, self._key(), self._load, self.offload) as text_model:
            return {text: text_model(text) for text in texts}

    def _key(self) -> str:
        hashes = dict(self.base.part_hashes)
        encoders = [part_key(self.base, part, self.dtype, self.stack) for part in ENCODERS]
        tokens = [entry.sha256 for entry in self.stack if entry.tokens]
        return json_sha256([encoders, hashes["tokenizer"], hashes["tokenizer_2"], *tokens])

    def _load(self) -> nn.Module:
        encoders = [load_merged(self.base, part, self.dtype, self.stack) for part in ENCODERS]
        tokens = {name: vectors for entry in self.stack for name, vectors in entry.tokens.items()}
        return TextModel(base_model.load_tokenizers(self.base), encoders, tokens)


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
    except (OSError, SafetensorError) as error:
        log.warning("prompt embeddings could not be kept: %s", error)
