"""Prompts as SDXL reads them: two CLIP encoders, penultimate layers side by side, one pooled vector.

Source: Podell et al., SDXL (arXiv 2307.01952), section 2.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK_TOKENS = 75  # what CLIP's 77 leave between the start and the end token


def encode_prompt_sdxl(
    prompts: Sequence[str], tokenizers: Sequence[Any], text_encoders: Sequence[Any], chunks: int = 1
) -> tuple[Tensor, Tensor]:
    """Returns prompt embeddings [B, 77, 768 + 1280] and pooled embeddings [B, 1280] in the encoders' dtype.

    The first encoder's pooled output is not used. A prompt over 77 tokens is cut, its end token kept. The empty prompt
    is encoded like any other, never replaced by zeros.

    With `chunks` over 1 a longer prompt goes on in further chunks of 75 tokens, each encoded between its own start and
    end token; their embeddings follow one another, [B, 77 n, ...], and the pooled ones are the first chunk's. That is
    how ComfyUI and A1111 read a long prompt. n is what the longest of `prompts` needs, at most `chunks`.
    """
    hidden, pooled = [], torch.empty(0)
    for tokenizer, encoder in zip(tokenizers, text_encoders, strict=True):
        parts = []
        for number, ids in enumerate(_chunks(prompts, tokenizer, chunks)):
            output = encoder(ids.to(encoder.device), output_hidden_states=True)
            parts.append(output.hidden_states[-2])
            if number == 0:
                pooled = getattr(output, "text_embeds", pooled)
        hidden.append(torch.cat(parts, dim=1))
    return torch.cat(hidden, dim=-1), pooled


def stack_embeds(rows: Sequence[Tensor]) -> Tensor:
    """Embeddings [T, C] of several prompts as one batch [B, T, C].

    Shorter ones are repeated up to a common length, which changes nothing: softmax attention over a sequence that is
    repeated gives what it gives over the sequence.
    """
    length = math.lcm(*(len(row) for row in rows))
    return torch.stack([row.repeat(length // len(row), 1) for row in rows])


def truncated_words(prompt: str, tokenizer: Any, chunks: int = 1) -> str:
    """What of `prompt` lies beyond `chunks` times 75 tokens (77 with start and end) and is not seen; empty if none."""
    tokens = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    return tokenizer.decode(tokens[chunks * CHUNK_TOKENS :]).strip()


def _chunks(prompts: Sequence[str], tokenizer: Any, limit: int) -> list[Tensor]:
    """Token ids [B, 77] of each chunk."""
    size = CHUNK_TOKENS
    if limit == 1:
        return [
            tokenizer(
                list(prompts), padding="max_length", max_length=size + 2, truncation=True, return_tensors="pt"
            ).input_ids
        ]
    tokens = [
        tokenizer(prompt, add_special_tokens=False, truncation=True, max_length=limit * size).input_ids
        for prompt in prompts
    ]
    count = max(1, math.ceil(max(map(len, tokens)) / size))
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    return [
        torch.tensor(
            [[start, *part, end, *[pad] * (size - len(part))] for part in (row[first : first + size] for row in tokens)]
        )
        for first in range(0, count * size, size)
    ]
