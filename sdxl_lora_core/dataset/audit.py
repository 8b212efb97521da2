"""Checks a dataset before training: duplicates, blurred and tiny images, captions, tags, and words that will fuse."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..images.decode import open_image
from ..images.likeness import pixel_vectors, sharpness
from .caption_dataset import CaptionDataset, CaptionEntry, image_count
from .caption_text import contains_word, split_tags

NEAR = 0.98  # correlation of pixels from which two images are near duplicates
_BLURRED = 0.15  # of the median sharpness
_LONG = 2.5  # longer by shorter side
_FUSED = 0.9  # share of the captions from which a word fuses with the trigger
_FEWEST = 5  # captions for which shares mean something
_SHARED = 3  # tags in several captions, such as the trigger word, that sentences may have as well
_MOST_TERMS = 40
_DECODERS = 4
_WORD = re.compile(r"[^\W_][\w'-]*")
# In any text, so they do not tell one subject from another.
_COMMON = frozenset(
    (
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "background",
        "behind",
        "by",
        "for",
        "from",
        "has",
        "her",
        "his",
        "in",
        "into",
    )
    + ("is", "it", "its", "of", "on", "or", "over", "she", "he", "that", "the", "their", "they", "this", "to", "under")
    + ("very", "was", "were", "while", "with")
)
# UTF-8 that was read as Windows-1252, and what decoders put in place of bytes they cannot read.
_MOJIBAKE = re.compile("[\u00c3\u00c2\u00c5][\u0080-\u00bf\u0192\u2018-\u203a\u20ac]|\u00e2\u20ac|\ufffd")

CaptionLength = Callable[[str], tuple[int, str]]  # tokens, and the words beyond 75 of them
OnImage = Callable[[int, int], object]


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


@dataclass(frozen=True)
class ImageFacts:
    """Measures of one image: its size in px, its bucket, its sharpness, and the tokens of its longest caption."""

    name: str
    role: str  # training, validation or regularisation
    width: int
    height: int
    bucket: tuple[int, int]
    sharpness: float
    tokens: int


@dataclass(frozen=True)
class DatasetAudit:
    """The result of `audit`.

    `terms` are the most frequent tags, with their numbers of captions; words where the captions are sentences.
    """

    name: str
    images: tuple[ImageFacts, ...]
    findings: tuple[Finding, ...]
    terms_are_tags: bool
    terms: tuple[tuple[str, int], ...]
    trigger_words: tuple[str, ...]

    def count(self, role: str) -> int:
        return sum(image.role == role for image in self.images)

    def sentences(self) -> list[str]:
        """Counts, then a line for each kind of problem."""
        roles = [(role, self.count(role)) for role in ("training", "validation", "regularisation")]
        counts = ", ".join(f"{count} for {role}" for role, count in roles if count)
        lines = [f"{self.name}: {image_count(len(self.images))} ({counts})"]
        lines += [f"{finding.title}: {len(finding.items)}. {finding.remedy}" for finding in self.findings]
        return lines if self.findings else [*lines, "Nothing to mend was found."]

    def as_json(self) -> dict[str, Any]:
        findings = [
            {
                "title": finding.title,
                "remedy": finding.remedy,
                "items": [{"images": [path.name for path in i.images], "text": i.text} for i in finding.items],
            }
            for finding in self.findings
        ]
        return {
            "name": self.name,
            "trigger_words": list(self.trigger_words),
            "images": [asdict(image) for image in self.images],
            "findings": findings,
            "tags" if self.terms_are_tags else "words": dict(self.terms),
        }


def audit(
    dataset: CaptionDataset, caption_length: CaptionLength, on_image: OnImage = lambda done, total: None
) -> DatasetAudit:
    """Checks all images and captions of a dataset. Decodes every image once.

    `caption_length` counts a caption's tokens. `on_image(done, total)` may raise to cancel.
    """
    roles = {"training": dataset.entries, "validation": dataset.validation, "regularisation": dataset.regularisation}
    pairs = [(entry, role) for role, entries in roles.items() for entry in entries]
    entries = [entry for entry, _ in pairs]
    vectors, sharp = _measured(entries, on_image)
    images = tuple(
        ImageFacts(
            name=entry.image.name,
            role=role,
            width=entry.width,
            height=entry.height,
            bucket=entry.bucket,
            sharpness=round(value, 2),
            tokens=max(caption_length(caption)[0] for caption in entry.captions),
        )
        for (entry, role), value in zip(pairs, sharp, strict=True)
    )
    captioned = [*dataset.entries, *dataset.validation]
    found = [
        _skipped(dataset),
        _exact_duplicates(pairs),
        _near_duplicates(pairs, vectors),
        _blurred(entries, sharp),
        _tiny(entries),
        _extreme(entries),
        _cut(entries, caption_length),
        _fused(captioned, dataset.trigger_words),
        _without_trigger(captioned, dataset.trigger_words),
        _garbled(dataset, entries),
    ]
    are_tags, terms = _terms([caption for entry in captioned for caption in entry.captions])
    return DatasetAudit(
        name=dataset.name,
        images=images,
        findings=tuple(finding for finding in found if finding.items),
        terms_are_tags=are_tags,
        terms=terms,
        trigger_words=dataset.trigger_words,
    )


def _terms(captions: Sequence[str]) -> tuple[bool, tuple[tuple[str, int], ...]]:
    """Whether captions share tags, and the most frequent ones; else the most frequent words."""
    tags = Counter(tag for caption in captions for tag in dict.fromkeys(split_tags(caption, ",")))
    if sum(count > 1 for count in tags.values()) > _SHARED:
        return True, tuple(tags.most_common(_MOST_TERMS))
    words = Counter(word for caption in captions for word in sorted(_words(caption) - _COMMON))
    return False, tuple(words.most_common(_MOST_TERMS))


def _measured(entries: Sequence[CaptionEntry], on_image: OnImage) -> tuple[np.ndarray, list[float]]:
    """The pixel vectors [N, 3072] and the sharpness of all images."""

    def measure(entry: CaptionEntry) -> tuple[np.ndarray, float]:
        pixels = np.asarray(open_image(entry.image))
        return pixel_vectors([pixels])[0].astype(np.float32), sharpness(pixels)

    vectors, sharp = [], []
    with ThreadPoolExecutor(_DECODERS) as pool:
        for vector, value in pool.map(measure, entries):
            vectors.append(vector)
            sharp.append(value)
            on_image(len(sharp), len(entries))
    return np.stack(vectors), sharp


def _skipped(dataset: CaptionDataset) -> Finding:
    items = [Item((), f"{problem.file}: {problem.reason}") for problem in dataset.problems if problem.skipped]
    return Finding("Skipped files", "They are not trained on.", tuple(items))


def _exact_duplicates(pairs: Sequence[tuple[CaptionEntry, str]]) -> Finding:
    groups: dict[str, list[tuple[CaptionEntry, str]]] = {}
    for entry, role in pairs:
        groups.setdefault(entry.sha256, []).append((entry, role))
    items = [_alike([entry.image for entry, _ in group], group) for group in groups.values() if len(group) > 1]
    return Finding("The same file twice", "Delete one: it is trained twice as often as the others.", tuple(items))


def _near_duplicates(pairs: Sequence[tuple[CaptionEntry, str]], vectors: np.ndarray) -> Finding:
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


def _blurred(entries: Sequence[CaptionEntry], sharp: Sequence[float]) -> Finding:
    limit = _BLURRED * float(np.median(sharp)) if len(entries) >= _FEWEST else 0.0
    items = [
        Item((entry.image,), f"{entry.image.name}: sharpness {value:.0f}, the median is {np.median(sharp):.0f}")
        for entry, value in zip(entries, sharp, strict=True)
        if value < limit
    ]
    return Finding("Much less sharp than the others", "Look at them: blur is learned as well.", tuple(items))


def _tiny(entries: Sequence[CaptionEntry]) -> Finding:
    items = [
        Item(
            (entry.image,),
            f"{entry.image.name}: {entry.width} x {entry.height}, trained at {crop.bucket_w} x {crop.bucket_h}",
        )
        for entry in entries
        if (crop := entry.center).resized_w > entry.width or crop.resized_h > entry.height
    ]
    return Finding("Smaller than they are trained", "They are enlarged and soft: lower the resolution.", tuple(items))


def _extreme(entries: Sequence[CaptionEntry]) -> Finding:
    items = [
        Item((entry.image,), f"{entry.image.name}: {entry.width} x {entry.height}")
        for entry in entries
        if max(entry.width, entry.height) > _LONG * min(entry.width, entry.height)
    ]
    return Finding("Very long or very high", "Much of them is cropped away: crop them yourself.", tuple(items))


def _cut(entries: Sequence[CaptionEntry], caption_length: CaptionLength) -> Finding:
    items = [
        Item((entry.image,), f"{entry.image.name}: {tokens} tokens, not read: {lost}")
        for entry in entries
        for caption in entry.captions
        for tokens, lost in [caption_length(caption)]
        if lost
    ]
    remedy = "Shorten them, or raise caption_chunks of Train Options: Captions."
    return Finding("Captions cut at 77 tokens (75 and the two ends)", remedy, tuple(items))


def _fused(entries: Sequence[CaptionEntry], trigger_words: Sequence[str]) -> Finding:
    """Words of nearly every caption: training cannot tell them from the trigger word, so they come with it."""
    if len(entries) < _FEWEST:
        return Finding("", "", ())
    counts = Counter(word for entry in entries for word in _words(entry.caption))
    own = {part for word in trigger_words for part in _words(word)}
    items = [
        Item((), f"{word}: in {count} of {len(entries)} captions")
        for word, count in counts.most_common()
        if count >= _FUSED * len(entries) and word not in own | _COMMON
    ]
    remedy = (
        "They fuse with the trigger word and come with it unasked. Remove them, unless they name the style you teach."
    )
    return Finding("Words in nearly every caption", remedy, tuple(items))


def _without_trigger(entries: Sequence[CaptionEntry], trigger_words: Sequence[str]) -> Finding:
    items = [
        Item((entry.image,), f"{entry.image.name}: {entry.written[0]}")
        for entry in entries
        if entry.written and trigger_words and not any(contains_word(entry.written[0], word) for word in trigger_words)
    ]
    some = items if len(items) < len(entries) else []  # where no caption has it, the trigger word is meant to be added
    remedy = "It is put in front of them, but other captions have it elsewhere: write it the same way everywhere."
    return Finding("Captions without the trigger word", remedy, tuple(some))


def _garbled(dataset: CaptionDataset, entries: Sequence[CaptionEntry]) -> Finding:
    items = [
        Item((entry.image,), f"{entry.image.name}: {caption}")
        for entry in entries
        for caption in entry.captions
        if _MOJIBAKE.search(caption)
    ]
    guessed = [problem for problem in dataset.problems if not problem.skipped and "is not UTF-8" in problem.reason]
    items += [Item((), f"{problem.file}: {problem.reason}") for problem in guessed]
    return Finding("Captions in a wrong encoding", "Save them as UTF-8.", tuple(items))


def _words(caption: str) -> set[str]:
    return {word.casefold() for word in _WORD.findall(caption)}
