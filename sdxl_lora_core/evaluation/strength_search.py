"""Finds the best strength of a LoRA with few images first, and more where the interval is still wide."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..generation.job import GenerationContext
from .choice import OVERALL, with_overall
from .comparison import Comparison, ComparisonJob, OnVariant, Result, compare
from .variants import Variant


@dataclass(frozen=True)
class Round:
    """One round of a search: its number of seeds, and the variants that were still compared."""

    seeds: int
    variants: tuple[str, ...]


def search(
    job: ComparisonJob, context: GenerationContext, on_variant: OnVariant = lambda done, total, name: None
) -> tuple[Comparison, tuple[Round, ...]]:
    """Compares the variants of `job` with 1, 2, 4 ... seeds, at most `job.config.count`.

    After each round those that are clearly worse than the leader, by the paired interval of the overall score, get no
    more images, and the search ends when the leader is told apart from all others. The images of a variant that was
    left out are None for the seeds it did not get, and its scores NaN.
    """
    rounds: list[Round] = []
    latest: dict[str, Result] = {}
    remaining, found = job.variants, None
    for seeds in _doubled(job.config.count):
        found = compare(replace(job, config=replace(job.config, count=seeds), variants=remaining), context, on_variant)
        rounds.append(Round(seeds, tuple(variant.name for variant in remaining)))
        latest |= {result.variant.name: result for result in found.results}
        remaining = _candidates(found)
        if len(remaining) <= 2:  # the baseline and the leader
            break
    assert found
    whole = [widened(latest[variant.name], rounds[-1].seeds, len(found.prompts)) for variant in job.variants]
    return replace(found, results=tuple(whole)), tuple(rounds)


def rounds_in_words(rounds: Sequence[Round]) -> str:
    return "; ".join(f"{found.seeds} seed{'s' * (found.seeds != 1)}: {', '.join(found.variants)}" for found in rounds)


def _doubled(most: int) -> Iterator[int]:
    seeds = 1
    while seeds < most:
        yield seeds
        seeds *= 2
    yield most


def _candidates(found: Comparison) -> tuple[Variant, ...]:
    """The baseline, the leader among the others, and all that are not told apart from it."""
    rated = with_overall(found)
    others = range(1, len(rated.results))
    leader = rated.leader(OVERALL, others)
    if leader is None:
        return tuple(result.variant for result in rated.results)
    known = [index for index in others if math.isfinite(rated.mean(OVERALL, index))]
    close = [index for index in known if index == leader or rated.difference(OVERALL, leader, index).verdict != 1]
    return tuple(rated.results[index].variant for index in (0, *close))


def widened(result: Result, seeds: int, prompts: int) -> Result:
    """The result with as many seeds, of which those it did not get have no image and no score."""
    missing = seeds - len(result.cells) // prompts
    if not missing:
        return result
    rows = [result.cells[start : start + seeds - missing] for start in range(0, len(result.cells), seeds - missing)]
    cells = tuple(cell for row in rows for cell in (*row, *[None] * missing))
    padding = np.full((prompts, missing), math.nan)
    scores = {metric: np.concatenate([values, padding], axis=1) for metric, values in result.scores.items()}
    return replace(result, cells=cells, scores=scores)
