"""Selects images by their scores."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .clip_score import rank
from .config import FilterConfig


@dataclass(frozen=True)
class Selection:
    """Indices of the accepted images, best first, and of the others, in their order. `summary` is a sentence."""

    accepted: tuple[int, ...]
    rejected: tuple[int, ...]
    summary: str


def select(scores: Sequence[float], config: FilterConfig) -> Selection:
    """Accepts images by their scores. One that is not a number is never accepted; ties keep their order.

    The best of N is better than a single image by chance alone, so the summary names N, and the mean of all.
    """
    known = [score for score in scores if math.isfinite(score)]
    order = [index for index in rank(scores) if math.isfinite(scores[index])]
    if config.keep == "best":
        accepted, how = order[: config.best], f"the best {min(config.best, len(order))}"
    else:
        accepted = [index for index in order if scores[index] >= config.threshold]
        how = f"{len(accepted)} of at least {config.threshold:g}"
    summary = f"{how} of {len(scores)} images accepted"
    if known:
        summary += f"; the mean score of all is {statistics.fmean(known):.3g}"
    if accepted:
        summary += f", of the accepted {statistics.fmean(scores[index] for index in accepted):.3g}"
    if missing := len(scores) - len(known):
        summary += f"; {missing} without a score rejected"
    rejected = tuple(index for index in range(len(scores)) if index not in set(accepted))
    return Selection(tuple(accepted), rejected, summary[0].upper() + summary[1:] + ".")
