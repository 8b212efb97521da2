"""Encodes prompts for SDXL: the penultimate layers of two CLIP encoders, concatenated, and one pooled vector.

Source: Podell et al., SDXL (arXiv 2307.01952), section 2.1. Stable Diffusion 1.5 takes the last layer of one encoder
after its final norm, and no pooled vector (Rombach et al., arXiv 2112.10752).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..runtime.device import sent

CHUNK_TOKENS = 75  # CLIP's 77 without the start and end tokens
TokenIds = Mapping[str, Sequence[int]]  # new tokens, and the ids of each


def encode_prompt_sdxl(
    prompts: Sequence[str],
    tokenizers: Sequence[Any],
    text_encoders: Sequence[Any],
    chunks: int = 1,
    new_tokens: TokenIds | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns prompt embeddings [B, 77 n, 768 + 1280] and pooled embeddings [B, 1280] in the encoders' dtype.

    The first encoder's pooled output is not used. n is the number of chunks of the longest prompt, at most `chunks`
    (see encode_text); shorter prompts are repeated to that length (see stack_embeds).
    """
    hidden, pooled = [], torch.empty(0)
    for tokenizer, encoder in zip(tokenizers, text_encoders, strict=True):
        rows, vectors = encode_text(prompts, tokenizer, encoder, chunks, new_tokens)
        hidden.append(stack_embeds(rows))
        pooled = pooled if vectors is None else vectors
    return torch.cat(hidden, dim=-1), pooled


def encode_text(
    prompts: Sequence[str], tokenizer: Any, encoder: Any, chunks: int = 1, new_tokens: TokenIds | None = None
) -> tuple[list[Tensor], Tensor | None]:
    """One encoder's embeddings [77 n, C] of each prompt, and pooled ones [B, P] if the encoder has a projection.

    A prompt over 75 tokens is truncated. The empty prompt is encoded like any other, not replaced by zeros. With
    `chunks` over 1 a long prompt is split into chunks of 75 tokens, each encoded with its own start and end token;
    their embeddings are concatenated, and the pooled embedding is that of the first chunk, as in ComfyUI and A1111.
    """
    chunked = [_chunks(token_ids(prompt, tokenizer, new_tokens or {}), tokenizer, chunks) for prompt in prompts]
    counts = [len(rows) for rows in chunked]
    hidden, pooled = _run([row for rows in chunked for row in rows], encoder)
    rows = [part.flatten(0, 1) for part in hidden.split(counts)]
    return rows, None if pooled is None else torch.stack([part[0] for part in pooled.split(counts)])


def encode_weighted(
    chunks: Sequence[Sequence[tuple[int, float]]], tokenizer: Any, encoder: Any, last_layer: bool = False
) -> tuple[Tensor, Tensor | None]:
    """One encoder's embeddings [77 n, C] of one prompt, and the pooled one [P] if the encoder has a projection.

    `chunks` are n rows of at most 75 token ids with weights. A weight w scales the distance of an embedding z to that
    of the empty prompt at the same position, e: e + w (z - e). The pooled embedding is that of the first chunk,
    without weights. Both as in ComfyUI. `last_layer` is that of the base's Family.
    """
    rows = [_row([number for number, _ in chunk], tokenizer) for chunk in chunks]
    weights = torch.ones(len(rows), CHUNK_TOKENS + 2, 1)
    for row, chunk in zip(weights, chunks, strict=True):
        row[1 : len(chunk) + 1, 0] = torch.tensor([weight for _, weight in chunk])
    if bool((weights == 1).all()):
        hidden, pooled = _run(rows, encoder, last_layer)
    else:
        hidden, pooled = _run([*rows, _row([], tokenizer)], encoder, last_layer)
        exact, empty, weights = hidden[:-1].float(), hidden[-1].float(), weights.to(hidden.device)
        hidden = torch.where(weights == 1, exact, (exact - empty) * weights + empty).to(hidden.dtype)
    return hidden.flatten(0, 1), None if pooled is None else pooled[0]


def stack_embeds(rows: Sequence[Tensor]) -> Tensor:
    """Embeddings [T, C] of several prompts as one batch [B, T, C].

    Shorter ones are repeated to a common length. That does not change the result: softmax attention over a repeated
    sequence equals that over the sequence.
    """
    length = math.lcm(*(len(row) for row in rows))
    return torch.stack([row.repeat(length // len(row), 1) for row in rows])


def truncated_words(prompt: str, tokenizer: Any, chunks: int = 1, new_tokens: TokenIds | None = None) -> str:
    """The end of `prompt` beyond `chunks` times 75 tokens, which is truncated; empty if nothing is."""
    unseen = token_ids(prompt, tokenizer, new_tokens or {})[chunks * CHUNK_TOKENS :]
    return tokenizer.decode([number for number in unseen if number < len(tokenizer)]).strip()


def token_ids(prompt: str, tokenizer: Any, new_tokens: TokenIds) -> list[int]:
    """The ids without start and end token. A new token is recognised as a whole word, in any case."""
    names = {name.lower(): ids for name, ids in new_tokens.items()}
    return [
        number
        for text in _split(prompt, names)
        for number in names.get(text.lower()) or tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    ]


def _split(prompt: str, words: Mapping[str, object]) -> Iterator[str]:
    """`prompt` split before and after each of `words`; a longer word is matched before one that it contains."""
    if not words:
        return iter([prompt])
    either = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return (text for text in re.split(rf"(?<!\w)({either})(?!\w)", prompt, flags=re.IGNORECASE) if text)


def _chunks(tokens: Sequence[int], tokenizer: Any, limit: int) -> list[list[int]]:
    """Rows of 77 ids each, at most `limit`: start, up to 75 of the tokens, end, padding."""
    size = CHUNK_TOKENS
    parts = [tokens[first : first + size] for first in range(0, max(1, len(tokens)), size)][:limit]
    return [_row(part, tokenizer) for part in parts]


def _row(tokens: Sequence[int], tokenizer: Any) -> list[int]:
    padding = [tokenizer.pad_token_id] * (CHUNK_TOKENS - len(tokens))
    return [tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id, *padding]


def _run(rows: Sequence[Sequence[int]], encoder: Any, last_layer: bool = False) -> tuple[Tensor, Tensor | None]:
    """The hidden states [N, 77, C] of N rows of ids, and the pooled embeddings [N, P]."""
    output = encoder(sent(torch.tensor(rows), encoder.device), output_hidden_states=True)
    hidden = output.last_hidden_state if last_layer else output.hidden_states[-2]
    return hidden, getattr(output, "text_embeds", None)
