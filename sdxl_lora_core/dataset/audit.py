"""Checks a dataset before training: duplicates, blurred and tiny images, captions, tags, and words that will fuse."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..images.decode import open_image
from ..images.likeness import pixel_vectors, sharpness
from . import audit_checks
from .audit_checks import COMMON_WORDS, CaptionLength, Finding, words_of
from .caption_dataset import CaptionDataset, CaptionEntry, image_count
from .caption_text import split_tags

_SHARED = 3  # tags in several captions, such as the trigger word, that sentences may have as well
_MOST_TERMS = 40
_DECODERS = 4

OnImage = Callable[[int, int], object]


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
    caption_length = functools.cache(caption_length)
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
        audit_checks.skipped(dataset),
        audit_checks.exact_duplicates(pairs),
        audit_checks.near_duplicates(pairs, vectors),
        audit_checks.blurred(entries, sharp),
        audit_checks.tiny(entries),
        audit_checks.extreme(entries),
        audit_checks.cut(entries, caption_length),
        audit_checks.fused(captioned, dataset.trigger_words),
        audit_checks.without_trigger(captioned, dataset.trigger_words),
        audit_checks.garbled(dataset, entries),
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
    words = Counter(word for caption in captions for word in sorted(words_of(caption) - COMMON_WORDS))
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
