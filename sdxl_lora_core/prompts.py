"""Prompts as SDXL reads them: two CLIP encoders, penultimate layers side by side, one pooled vector.

Source: Podell et al., SDXL (arXiv 2307.01952), section 2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def encode_prompt_sdxl(
    prompts: Sequence[str], tokenizers: Sequence[Any], text_encoders: Sequence[Any]
) -> tuple[Tensor, Tensor]:
    """Returns prompt embeddings [B, 77, 768 + 1280] and pooled embeddings [B, 1280] in the encoders' dtype.

    The first encoder's pooled output is not used. A prompt over 77 tokens is cut, its end token kept. The empty prompt
    is encoded like any other, never replaced by zeros.
    """
    hidden, pooled = [], torch.empty(0)
    for tokenizer, encoder in zip(tokenizers, text_encoders, strict=True):
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        output = encoder(tokens.input_ids.to(encoder.device), output_hidden_states=True)
        hidden.append(output.hidden_states[-2])
        pooled = getattr(output, "text_embeds", pooled)
    return torch.cat(hidden, dim=-1), pooled


def truncated_words(prompt: str, tokenizer: Any) -> str:
    """What of `prompt` lies beyond the tokenizer's 77 tokens and is not seen; empty if all of it fits."""
    tokens = tokenizer(prompt, add_special_tokens=False).input_ids
    return tokenizer.decode(tokens[tokenizer.model_max_length - 2 :]).strip()
