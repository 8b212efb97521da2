"""Pictures of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from .files import write_atomic


def draw_loss_chart(path: Path, title: str, losses: Sequence[float], learning_rates: Sequence[float]) -> None:
    """Writes a PNG with the raw loss, its smoothed course and the learning rate over the optimizer updates."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    steps = range(1, len(losses) + 1)
    axes = figure.add_subplot(title=title, xlabel="step", ylabel="loss")
    axes.plot(steps, losses, color="#9db4d3", linewidth=0.8, label="loss")
    axes.plot(steps, smoothed(losses), color="#1f4e8c", linewidth=2, label="smoothed")
    axes.grid(alpha=0.25)
    rate = axes.twinx()
    rate.plot(steps, learning_rates, color="#c2571a", linewidth=1, linestyle="--", label="learning rate")
    rate.set_ylabel("learning rate")
    rate.set_ylim(0, max(learning_rates) * 1.15)
    handles = [*axes.get_legend_handles_labels()[0], *rate.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, loc="upper right")
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", metadata={"Software": None}))


def smoothed(losses: Sequence[float], span: int = 50) -> list[float]:
    """Exponential moving average over about `span` steps without the bias to its first value; skips NaN."""
    decay, average, weight, result = 1 - 1 / span, 0.0, 0.0, []
    for loss in losses:
        if math.isfinite(loss):
            average = decay * average + (1 - decay) * loss
            weight = decay * weight + (1 - decay)
        result.append(average / weight if weight else math.nan)
    return result
