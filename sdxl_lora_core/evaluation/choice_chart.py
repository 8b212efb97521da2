"""The chart of a choice: prompt adherence against similarity to held-out images, and the overall score by variant."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..images.figures import new_figure, pixels_of
from ..images.fonts import with_families
from .choice import OVERALL, Choice
from .statistics import t_interval

_PLAIN, _BEST, _MEMORISED, _BASE = "#1f4e8c", "#2e7d32", "#b3261e", "#8a8a8a"


def choice_chart(choice: Choice) -> np.ndarray:
    """uint8 [H, W, 3], 1200 px wide. Green is the best, red memorised, grey the base. Without similarities only the
    overall scores, with 95 % intervals of their means over the prompts."""
    scattered = "similarity" in choice.comparison.titles
    figure = new_figure(10, 4.2)
    *left, right = figure.subplots(1, 2 if scattered else 1, squeeze=False)[0]
    for axes in left:
        _plot_scatter(axes, choice)
    _plot_overall(right, choice)
    return pixels_of(figure)


def _plot_scatter(axes: Any, choice: Choice) -> None:
    comparison = choice.comparison
    adherence = next(iter(comparison.titles))
    points = [(comparison.mean(adherence, i), comparison.mean("similarity", i)) for i in range(len(comparison.results))]
    axes.plot(*zip(*points[1:], strict=True), color="#cccccc", linewidth=1, zorder=1)
    for index, (x, y) in enumerate(points):
        axes.plot(x, y, "D" if index == choice.best else "o", color=_color(choice, index), markersize=8)
        name, families = with_families(comparison.results[index].variant.name)
        axes.annotate(name, (x, y), (5, 5), textcoords="offset points", fontsize=8, fontfamily=families)
    axes.set_xlabel(comparison.titles[adherence], fontsize=9)
    axes.set_ylabel(comparison.titles["similarity"], fontsize=9)
    axes.set_title("follows the prompt / looks like the data", fontsize=9, loc="left")
    _finish(axes)


def _plot_overall(axes: Any, choice: Choice) -> None:
    results = choice.comparison.results
    for index, result in enumerate(results):
        scores = result.scores[OVERALL]
        means = np.array([row[np.isfinite(row)].mean() for row in scores if np.isfinite(row).any()])
        interval = t_interval(means)
        axes.plot([index, index], [interval.low, interval.high], color=_color(choice, index), linewidth=2)
        axes.plot(index, means.mean(), "D" if index == choice.best else "o", color=_color(choice, index), markersize=8)
    names, families = with_families("\n".join(result.variant.name for result in results))
    axes.set_xticks(range(len(results)), names.split("\n"), rotation=40, ha="right", fontsize=8, fontfamily=families)
    axes.axhline(0, color="#333333", linewidth=1)
    axes.set_title("overall, in standard deviations from the base", fontsize=9, loc="left")
    _finish(axes)


def _color(choice: Choice, index: int) -> str:
    if index == 0:
        return _BASE
    if choice.memorisation and choice.memorisation.flagged[index]:
        return _MEMORISED
    return _BEST if index == choice.best else _PLAIN


def _finish(axes: Any) -> None:
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.margins(0.15)
