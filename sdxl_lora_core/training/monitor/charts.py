"""Charts of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...files import write_atomic
from ...images.figures import new_figure
from ...images.fonts import with_families
from ..run.loop_state import LoopState
from .progress import Smoothing

RAW, LOSS, VALIDATION, RATE = "#b9c9e0", "#1f4e8c", "#b3261e", "#8a8a8a"
SAMPLES, CHECKPOINTS, KEPT = "#2e7d32", "#6a4c93", "#333333"


def plot_losses(path: Path, title: str, state: LoopState, kept: int | None = None) -> None:
    """Writes a PNG of 960 x 540: losses with marked events, mean CLIP scores if any, and the learning rate.

    `kept` is the step that is saved if it is not the last one, shown as a vertical line.
    """
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(8, 4.5)
    scores = [(past.step, past.clip_score) for past in state.looks if past.clip_score is not None]
    heights = (5, 1, 1) if scores else (5, 1)
    losses, *others, rates = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    text, families = with_families(title)
    figure.suptitle(text, fontfamily=families)
    _plot_losses(losses, state)
    _plot_marks(losses, state)
    for axes in others:
        axes.plot(*zip(*scores, strict=True), color=SAMPLES, linewidth=1.5, marker="^", markersize=4)
        _label(axes, "CLIP\nscore")
    _plot_rates(rates, state)
    if kept is not None:
        _plot_kept((losses, *others, rates), kept)
    losses.legend(
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=6,
        frameon=False,
        fontsize=9,
        columnspacing=1.4,
        handlelength=1.6,
    )
    figure.align_ylabels()
    rates.set_xlabel("step")
    rates.xaxis.set_major_locator(MaxNLocator(integer=True))
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", metadata={"Software": None}))


def smoothed(losses: Sequence[float], span: int = 50) -> list[float]:
    """The moving average of the losses over about `span` values (see Smoothing)."""
    smoothing = Smoothing(span)
    return [smoothing.add(loss) for loss in losses]


def _plot_losses(axes: Any, state: LoopState) -> None:
    steps = range(1, len(state.losses) + 1)
    validations = [(past.step, past.validation_loss) for past in state.looks if past.validation_loss is not None]
    averages = smoothed(state.losses)
    axes.plot(steps, state.losses, color=RAW, linewidth=0.7, label="loss")
    axes.plot(steps, averages, color=LOSS, linewidth=2, label="loss, smoothed")
    if validations:
        axes.plot(
            *zip(*validations, strict=True),
            color=VALIDATION,
            linewidth=1.5,
            marker="o",
            markersize=4,
            label="validation loss",
        )
    axes.set_ylim(*_range(state.losses, [*averages, *(loss for _, loss in validations)]))
    _label(axes, "loss")


def _plot_marks(axes: Any, state: LoopState) -> None:
    """Marks along the lower edge, checkpoints above and samples below it, so that they hide no curve."""
    marks = [
        ("checkpoint", state.checkpoints, "|", 0.025, CHECKPOINTS),
        ("samples", [past.step for past in state.looks if past.clip_scores], "^", -0.025, SAMPLES),
    ]
    for name, steps, marker, height, color in marks:
        if steps:
            axes.plot(
                steps,
                [height] * len(steps),
                label=name,
                marker=marker,
                markersize=5,
                markeredgewidth=1.5,
                color=color,
                linestyle="none",
                transform=axes.get_xaxis_transform(),
                clip_on=False,
                zorder=3,
            )
    axes.tick_params(axis="x", bottom=False)


def _plot_kept(rows: Sequence[Any], step: int) -> None:
    for axes in rows:
        axes.axvline(step, color=KEPT, linewidth=1, linestyle="--", zorder=1, label=f"kept: step {step}")


def _plot_rates(axes: Any, state: LoopState) -> None:
    highest = max(state.learning_rates, default=0.0) or 1.0
    axes.plot(range(1, len(state.learning_rates) + 1), state.learning_rates, color=RATE, linewidth=1.5)
    axes.set_ylim(0, highest * 1.2)
    axes.set_yticks([0, highest], ["0", f"{highest:.3g}"])
    _label(axes, "learning\nrate")


def _label(axes: Any, name: str) -> None:
    axes.set_ylabel(name, fontsize=9)
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.25)


def _range(raw: Sequence[float], curves: Sequence[float]) -> tuple[float, float]:
    """The y limits: 90 % of the raw values and all `curves`, so that a few outliers do not flatten the rest."""
    known = sorted(loss for loss in raw if math.isfinite(loss))
    if not known:
        return 0.0, 1.0
    low, high = known[len(known) // 20], known[len(known) - 1 - len(known) // 20]
    shown = [low, high, *(value for value in curves if math.isfinite(value))]
    margin = 0.06 * (max(shown) - min(shown)) or 0.1
    return min(shown) - margin, max(shown) + margin
