"""New tokens for CLIP: words whose embeddings are learned (textual inversion, Gal et al., arXiv 2208.01618).

An encoder's vocabulary stays as it is; the vectors of new tokens follow its last row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .dataset.captions import holds_word
from .training.config.captions import tokens_of

if TYPE_CHECKING:
    from .dataset.caption_dataset import CaptionDataset
    from .training.config.train_config import TrainConfig


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
