"""Figures of matplotlib as images."""

from __future__ import annotations

from typing import Any

import numpy as np

_DPI = 120


def new_figure(width: float, height: float) -> Any:
    """A figure of `width` x `height` inches at 120 dots an inch, without any window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def pixels_of(figure: Any) -> np.ndarray:
    """The figure as uint8 [H, W, 3]."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
