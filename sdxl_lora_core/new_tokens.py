"""New tokens for CLIP: words whose embeddings are learned (textual inversion, Gal et al., arXiv 2208.01618).

An encoder's vocabulary stays as it is; the vectors of new tokens follow its last row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .dataset.captions import holds_word
from .text.encoding import CHUNK_TOKENS, TokenIds

if TYPE_CHECKING:
    from .dataset.caption_dataset import CaptionDataset
    from .train_config import TrainConfig

_NAME = re.compile(r"\w[\w-]*", re.ASCII)


def read_new_tokens(text: str, vectors_per_token: int) -> dict[str, str]:
    """`"ohwx=cat, zwx"` as the word that each new token starts from, empty for a random start.

    Raises ValueError for a name that is none, for one given twice and for more vectors than a prompt holds.
    """
    tokens: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, start = (part.strip() for part in entry.partition("="))
        if not _NAME.fullmatch(name):
            raise ValueError(f"new_tokens names {name!r}: take letters, digits, - and _ as in 'ohwx' or 'ohwx=cat'")
        if name.lower() in map(str.lower, tokens):
            raise ValueError(f"new_tokens names {name} twice: each token is learned once")
        tokens[name] = start
    if len(tokens) * vectors_per_token > CHUNK_TOKENS:
        raise ValueError(
            f"new_tokens has {len(tokens)} words and vectors_per_token is {vectors_per_token}: a prompt holds "
            f"{CHUNK_TOKENS} tokens, so lower vectors_per_token"
        )
    return tokens


def tokens_of(config: TrainConfig) -> dict[str, str]:
    """The new tokens of a run, and what each starts from."""
    return read_new_tokens(config.new_tokens, config.vectors_per_token)


def placeholder_ids(config: TrainConfig) -> TokenIds:
    """Ids beyond any vocabulary, to count with before the encoders are there."""
    return dict.fromkeys(tokens_of(config), [2**31 - 1] * config.vectors_per_token)


def all_trigger_words(dataset: CaptionDataset, config: TrainConfig) -> list[str]:
    """What calls for the LoRA in a prompt: the dataset's words and the new tokens."""
    return list(dict.fromkeys([*dataset.trigger_words, *tokens_of(config)]))


def require_shown(config: TrainConfig, captions: Sequence[str]) -> None:
    """Raises ValueError for a new token that none of the training captions holds."""
    for name in tokens_of(config):
        if not any(holds_word(caption, name) for caption in captions):
            raise ValueError(
                f"new_tokens names {name} and no caption holds it: give {name} as the dataset's trigger_word, or write "
                "it into the captions"
            )
