"""Tag recall: how many of a prompt's tags a tagger finds in its image. CLIP was not trained on lists of tags."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..vision.classifier import class_logits, labels_of, load_classifier
from ..vision.model_folder import OnImages, load_processor


@dataclass(frozen=True)
class TagRecall:
    """The tags of a prompt that were found in its image and those that were not; `unknown` the tagger does not have."""

    found: tuple[str, ...]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def recall(self) -> float:
        """found / (found + missing), 0 to 1; NaN if the tagger knows none of the tags."""
        known = len(self.found) + len(self.missing)
        return len(self.found) / known if known else math.nan


@dataclass(frozen=True)
class Tagger:
    """A tagger's folder and the probability from which a tag counts as found. `load` can return a loaded model."""

    folder: Path
    threshold: float
    device: torch.device | str = "cpu"
    load: Callable[[Path], torch.nn.Module] = load_classifier

    def recalls(
        self, images: Sequence[np.ndarray], prompts: Sequence[str], on_images: OnImages = lambda done, total: None
    ) -> tuple[TagRecall, ...]:
        """For each image (uint8 [H, W, 3]) the tags of its prompt, a list of tags without prompt syntax."""
        model = self.load(self.folder).to(self.device)
        numbers = {as_tag(label): number for number, label in enumerate(labels_of(model))}
        logits = class_logits(model, load_processor(self.folder, model), images, on_images)
        found = logits.sigmoid() >= self.threshold
        return tuple(
            _recall(split_prompt(prompt), numbers, row.tolist()) for prompt, row in zip(prompts, found, strict=True)
        )


def split_prompt(prompt: str) -> tuple[str, ...]:
    """The parts of a prompt between commas, as tags."""
    return tuple(dict.fromkeys(tag for part in prompt.split(",") if (tag := as_tag(part))))


def as_tag(text: str) -> str:
    """A tag as it is compared: `Long_Hair` and `long hair` are the same."""
    return " ".join(text.replace("_", " ").casefold().split())


def looks_like_tags(prompt: str) -> bool:
    """Whether a prompt is a list of tags and no sentence: at least four parts of two words on average."""
    tags = split_prompt(prompt)
    return len(tags) >= 4 and sum(len(tag.split()) for tag in tags) <= 2 * len(tags)


def _recall(tags: Sequence[str], numbers: dict[str, int], found: Sequence[bool]) -> TagRecall:
    known = [tag for tag in tags if tag in numbers]
    return TagRecall(
        found=tuple(tag for tag in known if found[numbers[tag]]),
        missing=tuple(tag for tag in known if not found[numbers[tag]]),
        unknown=tuple(tag for tag in tags if tag not in numbers),
    )
