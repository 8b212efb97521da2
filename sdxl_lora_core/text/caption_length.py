"""The length of captions in CLIP's tokens."""

from __future__ import annotations

import functools
from typing import Any

from ..sdxl.base import CONFIGS
from .encoding import token_ids, truncated_words


def caption_length(caption: str) -> tuple[int, str]:
    """The tokens of a caption, without start and end token, and the words that SDXL does not read beyond 75 of them."""
    tokenizer = _tokenizer()
    return len(token_ids(caption, tokenizer, {})), truncated_words(caption, tokenizer)


@functools.cache
def _tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(CONFIGS / "tokenizer"), local_files_only=True)
