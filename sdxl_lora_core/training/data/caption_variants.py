"""The captions an image is trained with: tags shuffled or dropped, and captions that are too long.

All variants are known before the run, so all of them are encoded once and cached. Each is a function of (seed, image,
caption, number).
"""

from __future__ import annotations

from collections.abc import Sequence

from ...dataset.caption_dataset import CaptionEntry
from ...dataset.caption_text import pinned_tags, split_tags
from ...hashed_random import uniform
from ...sdxl.base import SDXLBase, load_tokenizers
from ...text.encoding import CHUNK_TOKENS, TokenIds, truncated_words
from ..config.train_config import TrainConfig


def caption_variants(
    captions: Sequence[str], image: str, trigger_words: Sequence[str], config: TrainConfig
) -> tuple[str, ...]:
    """Every caption that the image with the hash `image` is trained with, all equally likely.

    These are the captions themselves, or `config.caption_variants` variants of each if tags are shuffled or dropped.
    """
    if not config.shuffle_tags and config.tag_dropout == 0:
        return tuple(captions)
    numbers = range(config.caption_variants)
    return tuple(
        _variant(caption, trigger_words, config, f"{config.seed}/{image}/{caption}/{number}")
        for caption in captions
        for number in numbers
    )


def _variant(caption: str, trigger_words: Sequence[str], config: TrainConfig, key: str) -> str:
    """A variant: the trigger words' tags, the first `keep_tags` others, then the remaining ones, shuffled."""
    tags = split_tags(caption, config.tag_separator)
    triggers = pinned_tags(tags, [part for word in trigger_words for part in split_tags(word, config.tag_separator)])
    others = [tag for tag in tags if tag not in triggers]
    kept, loose = others[: config.keep_tags], list(enumerate(others[config.keep_tags :]))
    loose = [(place, tag) for place, tag in loose if uniform(key, "drop", place) >= config.tag_dropout]
    if config.shuffle_tags:
        loose.sort(key=lambda item: uniform(key, "order", item[0]))
    joint = f"{config.tag_separator.strip()} "
    return joint.join([*triggers, *kept, *(tag for _, tag in loose)])


def truncated_captions(
    base: SDXLBase, entries: Sequence[CaptionEntry], chunks: int, new_tokens: TokenIds | None = None
) -> list[tuple[str, str]]:
    """The images with a caption too long for `chunks`: file name, and the words that are truncated."""
    # A known token is at least one byte, so most captions are found short without a tokenizer.
    captions = [(entry, caption) for entry in entries for caption in entry.captions]
    long = [(e, c) for e, c in captions if new_tokens or len(c.encode()) > chunks * CHUNK_TOKENS]
    if not long:
        return []
    tokenizer = load_tokenizers(base)[0]
    truncated = [(entry.image.name, truncated_words(caption, tokenizer, chunks, new_tokens)) for entry, caption in long]
    return [(name, words) for name, words in truncated if words]
