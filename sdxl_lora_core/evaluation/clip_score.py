"""CLIP score: how well images match a text (Radford et al., arXiv:2103.00020; Hessel et al., arXiv:2104.08718)."""

from __future__ import annotations

import json
import logging
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..images.sheets import text_strip
from .clip_model import embed_images, embed_text, load_clip, load_processor, load_tokenizer

log = logging.getLogger("sdxl_lora")

CONVENTION = "clip_score = 100 * max(cosine, 0) per image; clipscore_w25 = 2.5 * max(cosine, 0); no text prefix"

_TAG = re.compile(r"<\s*\w+\s*:[^<>]*>")  # <lora:name:0.8>
_EMBEDDING = re.compile(r"\bembedding:[^\s,()\[\]:]+", re.IGNORECASE)
_WEIGHT = re.compile(r":\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*(?=[)\]])")
_BREAK = re.compile(r"\bBREAK\b")
_BRACKET = re.compile(r"\\([()\[\]])|[()\[\]]")


@dataclass(frozen=True)
class Score:
    """Score of an image and a text: cosine in -1..1, clip_score in 0..100, clipscore_w25 in 0..2.5; NaN if unknown."""

    cosine: float
    clip_score: float
    clipscore_w25: float
    prompt: str


@dataclass(frozen=True)
class ScoreReport:
    """Scores in the order of the images; `order` has their indices, best first. `model` is the CLIP model's name.

    Scores of different CLIP models cannot be compared.
    """

    scores: tuple[Score, ...]
    order: tuple[int, ...]
    warnings: tuple[str, ...]
    model: str

    @property
    def mean(self) -> float:
        """Mean clip_score of the images that have one; NaN if none has."""
        known = self._known()
        return statistics.fmean(known) if known else math.nan

    @property
    def deviation(self) -> float:
        """Standard deviation (n - 1) of the clip_scores; 0 for a single image."""
        known = self._known()
        return statistics.stdev(known) if len(known) > 1 else 0.0

    def rows(self) -> list[dict[str, Any]]:
        """The scores as JSON values, in the order of the images. A score that is not a number is None."""
        return [
            {
                "rank": self.order.index(i) + 1,
                "image": i,
                "prompt": s.prompt,
                "cosine": _rounded(s.cosine),
                "clip_score": _rounded(s.clip_score),
                "clipscore_w25": _rounded(s.clipscore_w25),
            }
            for i, s in enumerate(self.scores)
        ]

    def to_json(self) -> str:
        """The report as JSON."""
        summary = {
            "model": self.model,
            "convention": CONVENTION,
            "images": len(self.scores),
            "mean": _rounded(self.mean),
            "standard_deviation": _rounded(self.deviation),
            "max": _rounded(self.scores[self.order[0]].clip_score),
            "order": list(self.order),
            "warnings": list(self.warnings),
            "scores": self.rows(),
        }
        return json.dumps(summary, ensure_ascii=False, indent=1, allow_nan=False)

    def _known(self) -> list[float]:
        return [score.clip_score for score in self.scores if math.isfinite(score.clip_score)]


def score_images(
    images: Sequence[np.ndarray],
    prompts: Sequence[str],
    clip_folder: Path,
    device: torch.device | str = "cpu",
    load: Callable[[Path], torch.nn.Module] = load_clip,
) -> ScoreReport:
    """Scores images (uint8 [H, W, 3], any sizes) against one text for all, or one text for each.

    Prompt syntax is removed first (`plain_text`). An image's score does not depend on the others. `load` can return
    a model that is loaded already. Raises ValueError if the counts do not match.
    """
    texts = _one_each([plain_text(prompt) for prompt in prompts], len(images))
    model = load(clip_folder).to(device)
    tokenizer, processor = load_tokenizer(clip_folder, model), load_processor(clip_folder, model)
    warnings: list[str] = []
    with torch.inference_mode():
        unique = {text: embed_text(model, tokenizer, text, warnings) for text in dict.fromkeys(texts)}
        embedded = embed_images(model, processor, images)
    cosines = [float(image @ unique[text]) for image, text in zip(embedded, texts, strict=True)]
    warnings += _warnings(model, clip_folder.name, images, cosines)
    for warning in warnings:
        log.warning("CLIP score: %s", warning)
    scores = tuple(_score(cosine, text) for cosine, text in zip(cosines, texts, strict=True))
    return ScoreReport(scores, rank(cosines), tuple(warnings), clip_folder.name)


def rank(cosines: Sequence[float]) -> tuple[int, ...]:
    """Indices, best first; ties in their original order, NaN last."""
    return tuple(sorted(range(len(cosines)), key=lambda i: (math.isnan(cosines[i]), -cosines[i], i)))


def plain_text(prompt: str) -> str:
    """Removes prompt syntax: (word:1.2), [word], <lora:name:1>, BREAK and embedding:name.

    Escaped brackets become plain ones.
    """
    text = _WEIGHT.sub("", _EMBEDDING.sub("", _TAG.sub("", prompt)))
    text = _BRACKET.sub(lambda match: match[1] or "", _BREAK.sub(",", text))
    parts = (" ".join(part.split()) for part in text.split(","))
    return ", ".join(part for part in parts if part)


def annotate(images: Sequence[np.ndarray], report: ScoreReport) -> list[np.ndarray]:
    """The images in their order, each with a strip below: rank, clip_score, prompt. uint8 [H + strip, W, 3]."""
    if len(images) != len(report.scores):
        raise ValueError(f"there are {len(images)} images and {len(report.scores)} scores: give the scored images")
    places = {index: place for place, index in enumerate(report.order, start=1)}
    return [_with_strip(image, report.scores[i], places[i]) for i, image in enumerate(images)]


def _with_strip(image: np.ndarray, score: Score, place: int) -> np.ndarray:
    value = f"{score.clip_score:.1f}" if math.isfinite(score.clip_score) else "no score"
    strip = text_strip(image.shape[1], [f"#{place}  CLIP {value}", score.prompt], size=max(12, image.shape[1] // 32))
    return np.concatenate([image, np.asarray(strip)])


def _score(cosine: float, text: str) -> Score:
    clamped = cosine if math.isnan(cosine) else max(cosine, 0.0)
    return Score(cosine, 100 * clamped, 2.5 * clamped, text)


def _rounded(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def _one_each(texts: Sequence[str], images: int) -> list[str]:
    if not images:
        raise ValueError("there are 0 images to score: give at least one")
    if len(texts) not in (1, images):
        raise ValueError(f"there are {len(texts)} prompts and {images} images: give one prompt, or one for each image")
    return list(texts) * images if len(texts) == 1 else list(texts)


def _warnings(model: Any, name: str, images: Sequence[np.ndarray], cosines: Sequence[float]) -> list[str]:
    unknown = [i for i, cosine in enumerate(cosines) if math.isnan(cosine)]
    found = [f"image {i} has no score (not a number), so it is ranked last" for i in unknown]
    side = model.config.vision_config.image_size
    largest = max(max(image.shape[:2]) for image in images)
    # Every CLIP trained on photographs has an input of at least 224 pixels.
    if side < 224 and largest > 2 * side:
        found.append(f"{name} is made for small drawings ({side} px): its scores at {largest} px are not meaningful")
    return found
