"""The figures of a dataset as charts: sizes, buckets, caption lengths and tags."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from ..images.figures import new_figure, pixels_of
from ..images.fonts import with_families
from .audit import DatasetAudit

_COLORS = {"training": "#1f4e8c", "validation": "#2e7d32", "regularisation": "#8a8a8a"}
_RED = "#b3261e"
_TOKENS = 75  # that CLIP reads of a caption
_TERMS = 15
_LONGEST = 32
_FEW = 6  # bars, below which they are not made higher


def audit_chart(audit: DatasetAudit) -> np.ndarray:
    """uint8 [H, W, 3], 1200 px wide."""
    figure = new_figure(10, 7)
    (sizes, buckets), (lengths, tags) = figure.subplots(2, 2)
    _plot_sizes(sizes, audit)
    _plot_buckets(buckets, audit)
    _plot_lengths(lengths, audit)
    _plot_terms(tags, audit)
    for axes in (sizes, buckets, lengths, tags):
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
    return pixels_of(figure)


def _plot_sizes(axes: Any, audit: DatasetAudit) -> None:
    for role, color in _COLORS.items():
        points = [(image.width, image.height) for image in audit.images if image.role == role]
        if points:
            axes.plot(*zip(*points, strict=True), "o", color=color, alpha=0.5, markersize=5, label=role)
    axes.set_xlim(0)
    axes.set_ylim(0)
    axes.set_xlabel("width (px)", fontsize=8)
    axes.set_ylabel("height (px)", fontsize=8)
    axes.set_title("sizes", fontsize=9, loc="left")
    axes.legend(fontsize=8, frameon=False)


def _plot_buckets(axes: Any, audit: DatasetAudit) -> None:
    counts = Counter(image.bucket for image in audit.images)
    names = [f"{width} x {height}" for width, height in sorted(counts)]
    axes.barh(range(len(names)), [counts[bucket] for bucket in sorted(counts)], color=_COLORS["training"])
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(max(len(names), _FEW) - 0.4, -0.6)
    axes.set_title("buckets: images trained at each size", fontsize=9, loc="left")


def _plot_lengths(axes: Any, audit: DatasetAudit) -> None:
    tokens = [image.tokens for image in audit.images]
    axes.hist(tokens, bins=range(0, max([*tokens, _TOKENS]) + 6, 5), color=_COLORS["training"])
    axes.axvline(_TOKENS, color=_RED, linewidth=1.5)
    axes.set_title(f"caption lengths in tokens; CLIP reads {_TOKENS}", fontsize=9, loc="left")


def _plot_terms(axes: Any, audit: DatasetAudit) -> None:
    shown = audit.terms[:_TERMS]
    short = [term if len(term) <= _LONGEST else f"{term[: _LONGEST - 1]}\u2026" for term, _ in shown]
    names, families = with_families("\n".join(short))
    axes.barh(range(len(shown)), [count for _, count in shown], color=_COLORS["training"])
    axes.set_yticks(range(len(shown)), names.split("\n") if shown else [], fontfamily=families)
    axes.invert_yaxis()
    axes.set_title(f"most frequent {'tags' if audit.terms_are_tags else 'words'}", fontsize=9, loc="left")
