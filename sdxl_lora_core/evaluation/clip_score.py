"""CLIP score: how well images match a text (Radford et al., arXiv:2103.00020; Hessel et al., arXiv:2104.08718)."""

from __future__ import annotations

import json
import logging
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..images.lazy import Lazy
from ..images.sheets import text_strip
from ..vision.image_text import embed_images, embed_text, load_clip, load_tokenizer
from ..vision.model_folder import OnImages, load_processor
from .config import Scale
from .tag_recall import Tagger, TagRecall, looks_like_tags

log = logging.getLogger("sdxl_lora")

CONVENTION = "clip_score = 100 * max(cosine, 0) per image; clipscore_w25 = 2.5 * max(cosine, 0); no text prefix"

_TAGS = "prompts are lists of tags"
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

    Scores of different CLIP models cannot be compared. `mean` and `deviation` are on `scale`. `recalls` are the images'
    tag recalls, empty without a tagger.
    """

    scores: tuple[Score, ...]
    order: tuple[int, ...]
    warnings: tuple[str, ...]
    model: str
    scale: Scale = "clip_score"
    recalls: tuple[TagRecall, ...] = ()

    @property
    def values(self) -> list[float]:
        """The scores on `scale`, in the order of the images; NaN if unknown."""
        return [getattr(score, self.scale) for score in self.scores]

    @property
    def mean(self) -> float:
        """Mean score of the images that have one; NaN if none has."""
        known = self._known()
        return statistics.fmean(known) if known else math.nan

    @property
    def deviation(self) -> float:
        """Standard deviation (n - 1) of the scores; 0 for a single image."""
        known = self._known()
        return statistics.stdev(known) if len(known) > 1 else 0.0

    @property
    def mean_recall(self) -> float:
        """Mean tag recall, 0 to 1, of the images that have one; NaN if none has."""
        known = [recall.recall for recall in self.recalls if math.isfinite(recall.recall)]
        return statistics.fmean(known) if known else math.nan

    def rows(self) -> list[dict[str, Any]]:
        """The scores as JSON values, in the order of the images. A score that is not a number is None."""
        return [
            {
                "rank": self.order.index(i) + 1,
                "image": i,
                "prompt": s.prompt,
                "cosine": rounded(s.cosine),
                "clip_score": rounded(s.clip_score),
                "clipscore_w25": rounded(s.clipscore_w25),
                **self._recall_row(i),
            }
            for i, s in enumerate(self.scores)
        ]

    def _recall_row(self, index: int) -> dict[str, Any]:
        if not self.recalls:
            return {}
        tags = self.recalls[index]
        return {
            "tag_recall": rounded(tags.recall),
            "tags_found": list(tags.found),
            "tags_missing": list(tags.missing),
            "tags_unknown": list(tags.unknown),
        }

    def to_json(self) -> str:
        """The report as JSON."""
        summary = {
            "model": self.model,
            "convention": CONVENTION,
            "scale": self.scale,
            "images": len(self.scores),
            "mean": rounded(self.mean),
            "standard_deviation": rounded(self.deviation),
            "max": rounded(self.values[self.order[0]]),
            **({"mean_tag_recall": rounded(self.mean_recall)} if self.recalls else {}),
            "order": list(self.order),
            "warnings": list(self.warnings),
            "scores": self.rows(),
        }
        return json.dumps(summary, ensure_ascii=False, indent=1, allow_nan=False)

    def _known(self) -> list[float]:
        return [value for value in self.values if math.isfinite(value)]


def score_images(
    images: Sequence[np.ndarray],
    prompts: Sequence[str],
    clip_folder: Path,
    device: torch.device | str = "cpu",
    load: Callable[[Path], torch.nn.Module] = load_clip,
    on_images: OnImages = lambda done, total: None,
) -> ScoreReport:
    """Scores images (uint8 [H, W, 3], any sizes) against one text for all, or one text for each.

    Prompt syntax is removed first (`plain_text`). An image's score does not depend on the others. `load` can return
    a model that is loaded already. `on_images(done, total)` may raise to cancel. Raises ValueError if the counts do not
    match.
    """
    texts = one_each([plain_text(prompt) for prompt in prompts], len(images))
    model = load(clip_folder).to(device)
    tokenizer, processor = load_tokenizer(clip_folder, model), load_processor(clip_folder, model)
    warnings: list[str] = []
    with torch.inference_mode():
        unique = {text: embed_text(model, tokenizer, text, warnings) for text in dict.fromkeys(texts)}
        embedded = embed_images(model, processor, images, on_images)
    cosines = [float(image @ unique[text]) for image, text in zip(embedded, texts, strict=True)]
    warnings += _warnings(model, clip_folder.name, max(map(_longer_side, images)), cosines)
    warnings += _tag_warnings(texts)
    for warning in warnings:
        log.warning("CLIP score: %s", warning)
    scores = tuple(_score(cosine, text) for cosine, text in zip(cosines, texts, strict=True))
    return ScoreReport(scores, rank(cosines), tuple(warnings), clip_folder.name)


def with_recalls(
    report: ScoreReport, images: Sequence[np.ndarray], tagger: Tagger, on_images: OnImages = lambda done, total: None
) -> ScoreReport:
    """The report of `images` with their tag recalls. A prompt without a tag that the tagger knows is a warning."""
    recalls = tagger.recalls(images, [score.prompt for score in report.scores], on_images)
    unknown = [i for i, recall in enumerate(recalls) if math.isnan(recall.recall)]
    warnings = [f"{tagger.folder.name} knows no tag of the prompts of {len(unknown)} images"] if unknown else []
    hint = [warning for warning in report.warnings if not warning.startswith(_TAGS)]
    return replace(report, recalls=recalls, warnings=(*hint, *warnings))


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


def annotate(images: Sequence[np.ndarray], report: ScoreReport) -> Sequence[np.ndarray]:
    """The images in their order, each with a strip below: rank, score, prompt. uint8 [H + strip, W, 3].

    Each is made when it is looked at.
    """
    if len(images) != len(report.scores):
        raise ValueError(f"there are {len(images)} images and {len(report.scores)} scores: give the scored images")
    places = {index: place for place, index in enumerate(report.order, start=1)}
    return Lazy(len(images), lambda i: _with_strip(images[i], report, i, places[i]))


def _with_strip(image: np.ndarray, report: ScoreReport, index: int, place: int) -> np.ndarray:
    value, digits = report.values[index], 1 if report.scale == "clip_score" else 3
    words = [f"#{place}  CLIP {value:.{digits}f}" if math.isfinite(value) else f"#{place}  CLIP no score"]
    if report.recalls and math.isfinite(report.recalls[index].recall):
        words.append(f"tags {report.recalls[index].recall:.0%}")
    lines = ["  ".join(words), report.scores[index].prompt]
    strip = text_strip(image.shape[1], lines, size=max(12, image.shape[1] // 32))
    return np.concatenate([image, np.asarray(strip)])


def _score(cosine: float, text: str) -> Score:
    clamped = cosine if math.isnan(cosine) else max(cosine, 0.0)
    return Score(cosine, 100 * clamped, 2.5 * clamped, text)


def rounded(value: float) -> float | None:
    """A JSON number of six decimals; None for a value that is not finite."""
    return round(value, 6) if math.isfinite(value) else None


def one_each(texts: Sequence[str], images: int) -> list[str]:
    """A text for each image. Raises ValueError unless there is one text for all images or one for each."""
    if not images:
        raise ValueError("there are 0 images to score: give at least one")
    if len(texts) not in (1, images):
        raise ValueError(f"there are {len(texts)} prompts and {images} images: give one prompt, or one for each image")
    return list(texts) * images if len(texts) == 1 else list(texts)


def _longer_side(image: np.ndarray) -> int:
    return max(image.shape[:2])


def _warnings(model: Any, name: str, largest: int, cosines: Sequence[float]) -> list[str]:
    unknown = [i for i, cosine in enumerate(cosines) if math.isnan(cosine)]
    found = [f"image {i} has no score (not a number), so it is ranked last" for i in unknown]
    side = model.config.vision_config.image_size
    # Every CLIP trained on photographs has an input of at least 224 pixels.
    if side < 224 and largest > 2 * side:
        found.append(f"{name} is made for small drawings ({side} px): its scores at {largest} px are not meaningful")
    return found


def _tag_warnings(texts: Sequence[str]) -> list[str]:
    tags = sum(looks_like_tags(text) for text in dict.fromkeys(texts))
    return [f"{_TAGS}, which CLIP was not trained on: a tagger gives the better score"] if tags else []
