"""Chooses the best of several variants of a LoRA, its checkpoints or strengths, and flags those that memorised."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .clip_score import rounded
from .comparison import Comparison, Metric
from .comparison_report import as_json
from .copies import LEAST_HELD_OUT, UNLIKELY, CopyDetector, copies_more_than
from .metrics import OnlyFor
from .references import References

OVERALL, NOVEL = "overall", "novel"
_OVERALL_TITLE = "overall: mean of the scores, in standard deviations from the base"


@dataclass(frozen=True)
class Memorisation:
    """How many images of each result are nearer to a training image than any held-out one is (`threshold`).

    A result is `flagged` if so many more than of the baseline, at the same prompts and seeds, would occur by chance in
    less than 1 of 100 comparisons.
    """

    threshold: float
    counts: tuple[int, ...]
    flagged: tuple[bool, ...]


@dataclass(frozen=True)
class Choice:
    """A comparison with the metric `overall`, and the index of the best result.

    That is the one with the highest overall mean, the baseline and flagged ones apart; if all are flagged, of those.
    """

    comparison: Comparison
    memorisation: Memorisation | None
    best: int

    def sentences(self) -> list[str]:
        names = [result.variant.name for result in self.comparison.results]
        found = [f"Best: {names[self.best]}, {self._against_base()}."]
        if close := [
            names[i] for i in self.comparison.undecided(OVERALL) if i and i != self.best and not self._flag(i)
        ]:
            found.append(f"Not told apart from it: {', '.join(close)}. More prompts or seeds would.")
        if self.memorisation and (flagged := [names[i] for i in range(1, len(names)) if self._flag(i)]):
            found.append(f"Memorised training images: {', '.join(flagged)}.")
            if self._flag(self.best):
                found.append("All of them did: train with fewer steps, a lower rank, or more images.")
        return [*found, *self.comparison.notes]

    def rows(self) -> list[dict[str, Any]]:
        """For each result the means of its metrics and its flags, as JSON values."""
        rows = []
        for index, result in enumerate(self.comparison.results):
            means = {metric: rounded(self.comparison.mean(metric, index)) for metric in self.comparison.titles}
            memorised = self.memorisation.counts[index] if self.memorisation else None
            flag = "memorised" if self._flag(index) else "best" if index == self.best else ""
            rows.append({"name": result.variant.name, **means, "memorised": memorised, "flag": flag})
        return rows

    def to_json(self) -> str:
        found = self.memorisation
        memorised = None if found is None else {"threshold": rounded(found.threshold)}
        document = {
            "best": self.comparison.results[self.best].variant.name,
            "sentences": self.sentences(),
            "rows": self.rows(),
            "memorisation": memorised,
            "comparison": as_json(self.comparison),
        }
        return json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False)

    def _flag(self, index: int) -> bool:
        return self.memorisation is not None and self.memorisation.flagged[index]

    def _against_base(self) -> str:
        found = self.comparison.difference(OVERALL, self.best)
        base = self.comparison.results[0].variant.name
        words = ("worse than", "not told apart from", "better than")[found.verdict + 1]
        return f"{words} the {base}: {found.mean:+.2f} standard deviations ({found.interval})"


def criteria(
    adherence: Metric, similarity: Metric | None, prompts: Sequence[str], novel: Sequence[str]
) -> tuple[Metric, ...]:
    """The metrics of a choice: adherence to the prompts, and to `novel` ones, which the data does not have; and
    similarity to held-out images, which says nothing about novel prompts."""
    found: list[Metric] = [OnlyFor(adherence, frozenset(prompts), adherence.name, adherence.title)]
    if novel:
        title = f"{adherence.title}, prompts that the data does not have"
        found.append(OnlyFor(adherence, frozenset(novel), NOVEL, title))
    if similarity:
        found.append(OnlyFor(similarity, frozenset(prompts), similarity.name, similarity.title))
    return tuple(found)


def choose(comparison: Comparison, memorisation: Memorisation | None) -> Choice:
    """The best of a comparison. Raises ValueError if no variant but the baseline has a score."""
    comparison = with_overall(comparison)
    others = range(1, len(comparison.results))
    clean = [index for index in others if not (memorisation and memorisation.flagged[index])]
    best = comparison.leader(OVERALL, clean) or comparison.leader(OVERALL, others)
    if best is None:
        raise ValueError("no image has a score, so there is no best one: check the models and prompts")
    return Choice(comparison, memorisation, best)


def with_overall(comparison: Comparison) -> Comparison:
    """Adds the metric `overall`: for each image the mean of its scores, each as its distance from the baseline's mean
    in standard deviations over all images, so that scores of different scales count alike.

    Novel prompts, of which there are few, have the unit of the others.
    """
    scores = {metric: np.stack([r.scores[metric] for r in comparison.results]) for metric in comparison.titles}
    scores = {metric: values for metric, values in scores.items() if np.isfinite(values[0]).any()}
    units = {metric: float(np.nanstd(values)) or 1.0 for metric, values in scores.items()}
    units |= {NOVEL: next(iter(units.values()))} if NOVEL in units else {}
    scaled = [(values - np.nanmean(values[0])) / units[metric] for metric, values in scores.items()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # an image without any score has no overall one
        overall = np.nanmean(scaled, axis=0)
    results = [
        replace(result, scores={**result.scores, OVERALL: values})
        for result, values in zip(comparison.results, overall, strict=True)
    ]
    return replace(comparison, results=tuple(results), titles={**comparison.titles, OVERALL: _OVERALL_TITLE})


def find_memorised(comparison: Comparison, found: References) -> Memorisation | None:
    """Which results memorised training images; None if there are no training or too few held-out images to tell."""
    if not len(found.training) or len(found.held_out) < LEAST_HELD_OUT:
        return None
    detector = CopyDetector(found)
    assert detector.threshold is not None
    by_result = [{i: cell.pixels for i, cell in enumerate(r.cells) if cell} for r in comparison.results]
    copies = [detector.find(list(cells.values())) for cells in by_result]
    flagged = []
    for cells, ours in zip(by_result, copies, strict=True):
        base = [near for i, near in zip(by_result[0], copies[0].nearest, strict=True) if i in cells]
        flagged.append(copies_more_than(ours, replace(copies[0], nearest=tuple(base))) < UNLIKELY)
    return Memorisation(detector.threshold, tuple(found.count for found in copies), tuple(flagged))
