"""The scores of a comparison as a chart: means by variant, and paired differences to the baseline."""

from __future__ import annotations

import numpy as np

from ..images.figures import new_figure, pixels_of
from ..images.fonts import with_families
from .comparison import Comparison
from .statistics import mean_and_deviation

_SCORE, _BETTER, _WORSE, _UNKNOWN = "#1f4e8c", "#2e7d32", "#b3261e", "#8a8a8a"
_LONGEST = 40  # letters of a variant's name


def comparison_chart(comparison: Comparison) -> np.ndarray:
    """uint8 [H, W, 3], 1200 px wide: for each metric the means on the left, the differences to the baseline with their
    95 % intervals on the right; green is better, red is worse, grey is not told apart."""
    metrics, count = list(comparison.titles), len(comparison.results)
    figure = new_figure(10, (0.9 + 0.34 * count) * len(metrics) + 0.3)
    axes = figure.subplots(len(metrics), 2, squeeze=False, sharey="row")
    names, families = with_families("\n".join(_short(result.variant.name) for result in comparison.results))
    for (means, differences), metric in zip(axes, metrics, strict=True):
        _plot_means(means, comparison, metric)
        _plot_differences(differences, comparison, metric)
        means.set_yticks(range(count), names.split("\n"), fontsize=8, fontfamily=families)
        means.set_ylim(count - 0.5, -0.5)
        for plot in (means, differences):
            plot.tick_params(axis="x", labelsize=8)
            plot.grid(alpha=0.25)
    return pixels_of(figure)


def _plot_means(axes, comparison: Comparison, metric: str) -> None:  # type: ignore[no-untyped-def]
    for place, result in enumerate(comparison.results):
        scores = result.scores[metric].ravel()
        axes.plot(scores, [place] * len(scores), "o", color=_SCORE, alpha=0.25, markersize=3)
        axes.plot(mean_and_deviation(scores)[0], place, "D", color=_SCORE, markersize=6)
    axes.set_title(comparison.titles[metric], fontsize=9, loc="left")


def _plot_differences(axes, comparison: Comparison, metric: str) -> None:  # type: ignore[no-untyped-def]
    axes.axvline(0, color="#333333", linewidth=1)
    for place in range(1, len(comparison.results)):
        found = comparison.difference(metric, place)
        color = (_WORSE, _UNKNOWN, _BETTER)[found.verdict + 1]
        axes.plot([found.interval.low, found.interval.high], [place, place], color=color, linewidth=2)
        axes.plot(found.mean, place, "o", color=color, markersize=6)
    axes.set_title(f"difference to {_short(comparison.results[0].variant.name)}, 95 % interval", fontsize=9, loc="left")


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
