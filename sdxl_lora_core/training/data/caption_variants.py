"""What an image may be shown with: its captions, their tags shuffled or thinned.

All forms are known before the run, so all of them are encoded once and cached. Each is a function of (seed, image,
caption, number).
"""

from __future__ import annotations

from collections.abc import Sequence

from ...dataset.caption_dataset import CaptionEntry
from ...dataset.captions import holds_word
from ...hashed_random import share
from ...sdxl.base import SDXLBase, load_tokenizers
from ...text.encoding import CHUNK_TOKENS, TokenIds, truncated_words
from ..config.train_config import TrainConfig


def caption_variants(
    captions: Sequence[str], image: str, trigger_words: Sequence[str], config: TrainConfig
) -> tuple[str, ...]:
    """Every text that `image` (its hash) may be shown with, each as likely as the others.

    The captions themselves, or `config.caption_variants` forms of each when tags are shuffled or dropped.
    """
    if not config.shuffle_tags and config.tag_dropout == 0:
        return tuple(captions)
    numbers = range(config.caption_variants)
    return tuple(
        _variant(caption, trigger_words, config, f"{config.seed}/{image}/{caption}/{number}")
        for caption in captions
        for number in numbers
    )


def _variant(caption: str, trigger_words: Sequence[str], config: TrainConfig, lot: str) -> str:
    """One form: the tags with a trigger word, the first `keep_tags` others, then what is left, in its new order."""
    tags = _split(caption, config.tag_separator)
    words = [part for word in trigger_words for part in _split(word, config.tag_separator)]
    triggers = [tag for tag in tags if any(holds_word(tag, word) for word in words)]
    others = [tag for tag in tags if tag not in triggers]
    kept, loose = others[: config.keep_tags], list(enumerate(others[config.keep_tags :]))
    loose = [(place, tag) for place, tag in loose if share(lot, "drop", place) >= config.tag_dropout]
    if config.shuffle_tags:
        loose.sort(key=lambda item: share(lot, "order", item[0]))
    joint = f"{config.tag_separator.strip()} "
    return joint.join([*triggers, *kept, *(tag for _, tag in loose)])


def _split(text: str, separator: str) -> list[str]:
    return [tag for part in text.split(separator) if (tag := part.strip())]


def cut_captions(
    base: SDXLBase, entries: Sequence[CaptionEntry], chunks: int, new_tokens: TokenIds | None = None
) -> list[tuple[str, str]]:
    """The images with a caption too long for `chunks`: file name, and the words that are not seen."""
    # A known token is at least a byte, so most captions need no tokenizer to be found short.
    captions = [(entry, caption) for entry in entries for caption in entry.captions]
    long = [(e, c) for e, c in captions if new_tokens or len(c.encode()) > chunks * CHUNK_TOKENS]
    if not long:
        return []
    tokenizer = load_tokenizers(base)[0]
    unseen = [(entry.image.name, truncated_words(caption, tokenizer, chunks, new_tokens)) for entry, caption in long]
    return [(name, words) for name, words in unseen if words]
