"""What may be wrong with the images and captions of a dataset: one function for each kind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .caption_dataset import CaptionDataset, CaptionEntry
from .caption_text import contains_word

NEAR = 0.98  # correlation of pixels from which two images are near duplicates
_BLURRED = 0.15  # of the median sharpness
_LONG = 2.5  # longer by shorter side
_FUSED = 0.9  # share of the captions from which a word fuses with the trigger
_FEWEST = 5  # captions for which shares mean something
_WORD = re.compile(r"[^\W_][\w'-]*")
# In any text, so they do not tell one subject from another.
COMMON_WORDS = frozenset(
    ("a", "an", "and", "are", "as", "at", "background", "behind", "by", "for", "from", "has", "her", "his", "in")
    + ("into", "is", "it", "its", "of", "on", "or", "over", "she", "he", "that", "the", "their", "they", "this", "to")
    + ("under", "very", "was", "were", "while", "with")
)
# UTF-8 that was read as Windows-1252, and what decoders put in place of bytes they cannot read.
_MOJIBAKE = re.compile("[\u00c3\u00c2\u00c5][\u0080-\u00bf\u0192\u2018-\u203a\u20ac]|\u00e2\u20ac|\ufffd")

CaptionLength = Callable[[str], tuple[int, str]]  # tokens, and the words beyond 75 of them


@dataclass(frozen=True)
class Item:
    """What was found about one or more images: their files, and a line about them."""

    images: tuple[Path, ...]
    text: str


@dataclass(frozen=True)
class Finding:
    """One kind of problem: its title, what to do about it, and where it was found."""

    title: str
    remedy: str
    items: tuple[Item, ...]


def skipped(dataset: CaptionDataset) -> Finding:
    items = [Item((), f"{problem.file}: {problem.reason}") for problem in dataset.problems if problem.skipped]
    return Finding("Skipped files", "They are not trained on.", tuple(items))


def exact_duplicates(pairs: Sequence[tuple[CaptionEntry, str]]) -> Finding:
    groups: dict[str, list[tuple[CaptionEntry, str]]] = {}
    for entry, role in pairs:
        groups.setdefault(entry.sha256, []).append((entry, role))
    items = [_alike([entry.image for entry, _ in group], group) for group in groups.values() if len(group) > 1]
    return Finding("The same file twice", "Delete one: it is trained twice as often as the others.", tuple(items))


def near_duplicates(pairs: Sequence[tuple[CaptionEntry, str]], vectors: np.ndarray) -> Finding:
    items = []
    for first in range(len(pairs)):
        correlations = vectors[first + 1 :] @ vectors[first]
        for second in first + 1 + np.flatnonzero(correlations >= NEAR):
            pair = [pairs[first], pairs[int(second)]]
            if pair[0][0].sha256 != pair[1][0].sha256:
                items.append(_alike([entry.image for entry, _ in pair], pair))
    return Finding(
        "Nearly the same image",
        "Keep the better one. One in training and one in validation makes the validation loss too low.",
        tuple(items),
    )


def _alike(images: list[Path], group: Sequence[tuple[CaptionEntry, str]]) -> Item:
    roles = {role for _, role in group}
    across = f" (one is for {' and one for '.join(sorted(roles))})" if len(roles) > 1 else ""
    return Item(tuple(images), " and ".join(path.name for path in images) + across)


def blurred(entries: Sequence[CaptionEntry], sharp: Sequence[float]) -> Finding:
    limit = _BLURRED * float(np.median(sharp)) if len(entries) >= _FEWEST else 0.0
    items = [
        Item((entry.image,), f"{entry.image.name}: sharpness {value:.0f}, the median is {np.median(sharp):.0f}")
        for entry, value in zip(entries, sharp, strict=True)
        if value < limit
    ]
    return Finding("Much less sharp than the others", "Look at them: blur is learned as well.", tuple(items))


def tiny(entries: Sequence[CaptionEntry]) -> Finding:
    items = [
        Item(
            (entry.image,),
            f"{entry.image.name}: {entry.width} x {entry.height}, trained at {crop.bucket_w} x {crop.bucket_h}",
        )
        for entry in entries
        if (crop := entry.center).resized_w > entry.width or crop.resized_h > entry.height
    ]
    return Finding("Smaller than they are trained", "They are enlarged and soft: lower the resolution.", tuple(items))


def extreme(entries: Sequence[CaptionEntry]) -> Finding:
    items = [
        Item((entry.image,), f"{entry.image.name}: {entry.width} x {entry.height}")
        for entry in entries
        if max(entry.width, entry.height) > _LONG * min(entry.width, entry.height)
    ]
    return Finding("Very long or very high", "Much of them is cropped away: crop them yourself.", tuple(items))


def cut(entries: Sequence[CaptionEntry], caption_length: CaptionLength) -> Finding:
    items = [
        Item((entry.image,), f"{entry.image.name}: {tokens} tokens, not read: {lost}")
        for entry in entries
        for caption in entry.captions
        for tokens, lost in [caption_length(caption)]
        if lost
    ]
    remedy = "Shorten them, or raise caption_chunks of Train Options: Captions."
    return Finding("Captions cut at 77 tokens (75 and the two ends)", remedy, tuple(items))


def fused(entries: Sequence[CaptionEntry], trigger_words: Sequence[str]) -> Finding:
    """Words of nearly every caption: training cannot tell them from the trigger word, so they come with it."""
    if len(entries) < _FEWEST:
        return Finding("", "", ())
    counts = Counter(word for entry in entries for word in words_of(entry.caption))
    own = {part for word in trigger_words for part in words_of(word)}
    items = [
        Item((), f"{word}: in {count} of {len(entries)} captions")
        for word, count in counts.most_common()
        if count >= _FUSED * len(entries) and word not in own | COMMON_WORDS
    ]
    remedy = (
        "They fuse with the trigger word and come with it unasked. Remove them, unless they name the style you teach."
    )
    return Finding("Words in nearly every caption", remedy, tuple(items))


def without_trigger(entries: Sequence[CaptionEntry], trigger_words: Sequence[str]) -> Finding:
    items = [
        Item((entry.image,), f"{entry.image.name}: {entry.written[0]}")
        for entry in entries
        if entry.written and trigger_words and not any(contains_word(entry.written[0], word) for word in trigger_words)
    ]
    some = items if len(items) < len(entries) else []  # where no caption has it, the trigger word is meant to be added
    remedy = "It is put in front of them, but other captions have it elsewhere: write it the same way everywhere."
    return Finding("Captions without the trigger word", remedy, tuple(some))


def garbled(dataset: CaptionDataset, entries: Sequence[CaptionEntry]) -> Finding:
    items = [
        Item((entry.image,), f"{entry.image.name}: {caption}")
        for entry in entries
        for caption in entry.captions
        if _MOJIBAKE.search(caption)
    ]
    guessed = [problem for problem in dataset.problems if not problem.skipped and "is not UTF-8" in problem.reason]
    items += [Item((), f"{problem.file}: {problem.reason}") for problem in guessed]
    return Finding("Captions in a wrong encoding", "Save them as UTF-8.", tuple(items))


def words_of(caption: str) -> set[str]:
    return {word.casefold() for word in _WORD.findall(caption)}
