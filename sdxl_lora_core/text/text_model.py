"""The text encoders of a base as one module, which encodes parsed prompts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..sdxl.family import SDXL, Family, Part
from .embedding_files import ENCODER_KEYS, EmbeddingFile, Vectors
from .encoding import TokenIds, encode_weighted, token_ids
from .new_tokens import added_tokens
from .prompt_syntax import Piece, Reading, Token, chunked

log = logging.getLogger("sdxl_lora")


class TextEmbeds(NamedTuple):
    """The embeddings of one prompt, `hidden` [1, 77 n, C] and `pooled` [1, P], on the CPU; P is 0 for SD 1.5."""

    hidden: Tensor
    pooled: Tensor


class TextModel(nn.Module):
    """The text encoders with their tokenizers: loading a vocabulary takes as long as loading an encoder."""

    def __init__(
        self,
        tokenizers: Sequence[Any],
        encoders: Sequence[nn.Module],
        tokenizer_hashes: tuple[str, ...] = (),
        family: Family = SDXL,
    ) -> None:
        super().__init__()
        self.family = family
        self.tokenizer_hashes = tokenizer_hashes
        self.tokenizers = tokenizers
        self.encoders = nn.ModuleList(encoders)

    def forward(self, reading: Reading, words: Mapping[str, Vectors]) -> TextEmbeds:
        """Encodes one prompt. `words` are new tokens that are recognised in its text."""
        contents = [content for content, _ in reading.pieces]
        files = {content: content.vectors() for content in contents if isinstance(content, EmbeddingFile)}
        hidden, pooled = [], torch.empty(0)
        for part, tokenizer, encoder in zip(self.family.encoders, self.tokenizers, self.encoders, strict=True):
            _require_width(part, encoder, files)
            vectors = {name: rows[part] for name, rows in {**words, **_named(files)}.items()}
            with added_tokens(encoder, tokenizer, vectors) as ids:
                reader = self.tokenizers[0] if reading.one_tokenizer else tokenizer
                chunks = chunked([_tokens(piece, reader, ids, words) for piece in reading.pieces])
                if reading.chunks and part == self.family.encoders[0]:
                    _warn_of(chunks[reading.chunks :], tokenizer)
                embeds, pooled_embeds = encode_weighted(
                    chunks[: reading.chunks], tokenizer, encoder, self.family.last_layer
                )
            hidden.append(embeds.cpu())
            pooled = pooled if pooled_embeds is None else pooled_embeds.cpu()
        return TextEmbeds(torch.cat(hidden, dim=-1)[None], pooled[None])


def _tokens(piece: Piece, tokenizer: Any, ids: TokenIds, words: Iterable[str]) -> list[Token]:
    content = piece.content
    if isinstance(content, EmbeddingFile):
        numbers = ids[_name(content)]
    else:
        numbers = token_ids(content, tokenizer, {word: ids[word] for word in words})
    return [(number, piece.weight) for number in numbers]


def _name(file: EmbeddingFile) -> str:
    return f"embedding:{file.name}"


def _named(files: Mapping[EmbeddingFile, Vectors]) -> dict[str, Vectors]:
    return {_name(file): vectors for file, vectors in files.items()}


def _require_width(part: Part, encoder: Any, files: Mapping[EmbeddingFile, Vectors]) -> None:
    width = encoder.get_input_embeddings().embedding_dim
    for file, vectors in files.items():
        if vectors[part].shape[1] != width:
            raise ValueError(
                f"{_name(file)} has vectors of {vectors[part].shape[1]} numbers for {ENCODER_KEYS[part]}, and this "
                f"base's have {width}: use the version of the embedding made for this base"
            )


def _warn_of(unseen: Sequence[Sequence[Token]], tokenizer: Any) -> None:
    numbers = [number for chunk in unseen for number, _ in chunk if number < len(tokenizer)]
    if words := tokenizer.decode(numbers).strip():
        log.warning(
            "the prompt is longer than CLIP's 77 tokens, so its end has no effect "
            "(set long_prompts to chunks to use it): %s",
            words,
        )
