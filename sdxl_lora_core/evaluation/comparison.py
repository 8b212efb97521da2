"""Compares variants over the same prompts and seeds: makes their images, scores them, and tests the differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from ..generation.config import GenerateConfig
from ..generation.generate import generate, require_for_family
from ..generation.job import GenerationContext, GenerationJob
from ..sdxl.base import SDXLBase
from .statistics import PairedDifference, mean_and_deviation, paired_difference
from .variants import Variant, require_distinct

OnVariant = Callable[[int, int, str], object]


class Metric(Protocol):
    """A score of images, higher is better. `name` is its key, `title` stands over tables, with the model's name."""

    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str: ...

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Sequence[float]:
        """A number for each image (uint8 [H, W, 3]) with its prompt; NaN if it has none."""
        ...


@dataclass(frozen=True)
class Cell:
    """One image of a variant, uint8 [H, W, 3], with its prompt and seed; `key` is that of the image cache.

    `hit` says that it came from the cache; None for a given image, which has no key either.
    """

    pixels: np.ndarray
    prompt: str
    seed: int
    key: str = ""
    hit: bool | None = None


@dataclass(frozen=True)
class Result:
    """The images of a variant, ordered by prompt, then by seed, and its scores [prompts, seeds] by metric.

    A cell is None, and its scores NaN, if a search did not make it (see strength_search).
    """

    variant: Variant
    cells: tuple[Cell | None, ...]
    scores: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class ComparisonJob:
    """What is compared. Variants have the prompts and seeds of `config`, and its settings unless they change them.

    The first variant is the baseline.
    """

    base: SDXLBase
    config: GenerateConfig
    variants: tuple[Variant, ...]
    metrics: tuple[Metric, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """The results of all variants; the first is the baseline. `titles` of the metrics by name."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    results: tuple[Result, ...]
    titles: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def generated(self) -> tuple[int, int]:
        """The number of images that are not given, and how many of them came from the cache."""
        hits = [cell.hit for result in self.results for cell in result.cells if cell and cell.hit is not None]
        return len(hits), sum(hits)

    def difference(self, metric: str, first: int, second: int = 0) -> PairedDifference:
        """The paired difference of two results, by index."""
        return paired_difference(self.results[first].scores[metric], self.results[second].scores[metric])

    def mean(self, metric: str, index: int) -> float:
        return mean_and_deviation(self.results[index].scores[metric])[0]

    def leader(self, metric: str, among: Sequence[int] | None = None) -> int | None:
        """The index of the highest mean, of all or `among` some, the first of equals; None if none has a score."""
        indices = range(len(self.results)) if among is None else among
        means = {index: self.mean(metric, index) for index in indices}
        known = [index for index, mean in means.items() if math.isfinite(mean)]
        return max(known, key=lambda index: means[index], default=None)

    def undecided(self, metric: str) -> list[int]:
        """The variants that the intervals do not tell from the leader."""
        leader = self.leader(metric)
        others = [] if leader is None else [index for index in range(len(self.results)) if index != leader]
        return [index for index in others if leader is not None and self.difference(metric, leader, index).verdict != 1]

    def winner(self, metric: str) -> int | None:
        """The leader, if it is better than every other variant by their intervals."""
        return None if self.undecided(metric) else self.leader(metric)


def compare(
    job: ComparisonJob, context: GenerationContext, on_variant: OnVariant = lambda done, total, name: None
) -> Comparison:
    """Makes the images of every variant through the image cache, then scores them.

    Each is bit for bit the image that `generate` makes with the settings of its variant. A comparison that is
    cancelled or repeated finds its images in the cache. `on_variant(done, total, name)` is called before each variant.
    Raises what `generate` raises, and ValueError for variants of one name, missing prompts, or a number of given images
    that does not fit; all of it before the first image is made.
    """
    job = _checked(job)
    prompts, seeds = job.config.prompts, seeds_of(job.config)
    columns: list[tuple[Cell, ...]] = []
    for number, variant in enumerate(job.variants):
        on_variant(number, len(job.variants), variant.name)
        columns.append(_cells(variant, job, context))
    scores = _scores(job.metrics, columns, (len(prompts), len(seeds)))
    results = [
        Result(variant, cells, {name: values[number] for name, values in scores.items()})
        for number, (variant, cells) in enumerate(zip(job.variants, columns, strict=True))
    ]
    return Comparison(prompts, seeds, tuple(results), {metric.name: metric.title for metric in job.metrics})


def seeds_of(config: GenerateConfig) -> tuple[int, ...]:
    return tuple((config.seed + number) % 2**64 for number in range(config.count))


def _checked(job: ComparisonJob) -> ComparisonJob:
    config = replace(job.config, prompt_per_line=True)
    if not all(prompt.strip() for prompt in config.prompts):
        raise ValueError("prompt is empty: give one prompt per line to compare with")
    require_distinct(job.variants)
    count = len(config.prompts) * config.count
    for variant in job.variants:
        require_for_family(_generation(variant, replace(job, config=config)))
        if variant.given is not None and len(variant.given) != count:
            raise ValueError(
                f"variant {variant.name} has {len(variant.given)} images: a comparison of {len(config.prompts)} "
                f"prompts and {config.count} seeds needs {count}, ordered by prompt"
            )
    return replace(job, config=config)


def _cells(variant: Variant, job: ComparisonJob, context: GenerationContext) -> tuple[Cell, ...]:
    if variant.given is not None:
        pairs = [(prompt, seed) for prompt in job.config.prompts for seed in seeds_of(job.config)]
        return tuple(Cell(pixels, *pair) for pixels, pair in zip(variant.given, pairs, strict=True))
    images = generate(_generation(variant, job), context)
    return tuple(Cell(image.pixels, image.prompt, image.seed, image.key, image.hit) for image in images)


def _generation(variant: Variant, job: ComparisonJob) -> GenerationJob:
    return GenerationJob(variant.base or job.base, variant.config(job.config), variant.loras)


def _scores(
    metrics: Sequence[Metric], columns: Sequence[Sequence[Cell]], shape: tuple[int, int]
) -> dict[str, np.ndarray]:
    """For each metric the scores [variants, prompts, seeds]."""
    cells = [cell for column in columns for cell in column]
    images, prompts = [cell.pixels for cell in cells], [cell.prompt for cell in cells]
    return {
        metric.name: np.array(metric.score(images, prompts), dtype=np.float64).reshape(len(columns), *shape)
        for metric in metrics
    }
