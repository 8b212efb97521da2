"""The settings of scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..settings import Range, check_settings, setting

Scale = Literal["clip_score", "clipscore_w25"]
Keep = Literal["best", "threshold"]


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """How images are scored against texts."""

    scale: Scale = setting(
        "clip_score",
        "The number that is shown and output. clip_score: 100 x the cosine of image and text. clipscore_w25: 2.5 x the "
        "cosine, as in the CLIPScore paper. Neither is below 0; the report has both.",
    )
    tag_threshold: float = setting(
        0.35,
        "With a tagger: the probability from which a tag counts as found in an image.",
        Range(0.01, 0.99, step=0.01, rounded=True),
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Which images are accepted by their scores."""

    keep: Keep = setting(
        "best", "best: the images with the highest scores. threshold: all with at least the given score."
    )
    best: int = setting(1, "How many images to accept.", Range(1, 4096), only_with={"keep": ("best",)})
    threshold: float = setting(
        25.0,
        "The lowest score that is accepted.",
        Range(-1000.0, 1000.0, step=0.1),
        only_with={"keep": ("threshold",)},
    )

    def __post_init__(self) -> None:
        check_settings(self)
