"""The scores of a comparison: prompt adherence by CLIP or a tagger, and similarity to held-out images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..vision.image_text import load_clip
from ..vision.model_folder import OnImages
from .clip_score import plain_text, score_images
from .comparison import Metric
from .similarity import Features
from .tag_recall import Tagger


@dataclass(frozen=True)
class ClipAdherence:
    """100 x the cosine of image and prompt, not below 0."""

    folder: Path
    device: torch.device | str = "cpu"
    load: Callable[[Path], torch.nn.Module] = load_clip
    on_images: OnImages = lambda done, total: None
    name: str = "clip_score"

    @property
    def title(self) -> str:
        return f"CLIP score ({self.folder.name})"

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Sequence[float]:
        return score_images(images, prompts, self.folder, self.device, self.load, self.on_images).values


@dataclass(frozen=True)
class TagAdherence:
    """The share of the prompt's tags that a tagger finds, in percent."""

    tagger: Tagger
    on_images: OnImages = lambda done, total: None
    name: str = "tag_recall"

    @property
    def title(self) -> str:
        return f"tag recall in % ({self.tagger.folder.name})"

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Sequence[float]:
        texts = [plain_text(prompt) for prompt in prompts]
        return [100 * found.recall for found in self.tagger.recalls(images, texts, self.on_images)]


@dataclass(frozen=True)
class ReferenceSimilarity:
    """100 x the mean cosine with held-out reference images."""

    features: Features
    references: Sequence[np.ndarray]
    name: str = "similarity"

    @property
    def title(self) -> str:
        return f"similarity to {len(self.references)} held-out images ({self.features.name})"

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Sequence[float]:
        cosines = self.features.unit(images) @ self.features.unit(self.references).T
        return (100 * cosines.mean(1)).tolist()


@dataclass(frozen=True)
class OnlyFor:
    """A metric for the images of some prompts only; the others have no score."""

    metric: Metric
    prompts: frozenset[str]
    name: str
    title: str

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Sequence[float]:
        chosen = [number for number, prompt in enumerate(prompts) if prompt in self.prompts]
        scores = [math.nan] * len(images)
        found = self.metric.score([images[i] for i in chosen], [prompts[i] for i in chosen]) if chosen else ()
        for number, score in zip(chosen, found, strict=True):
            scores[number] = score
        return scores
