"""The analysis of a stack as a picture: what each LoRA changes by block, and how each pair meets there."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..images.figures import new_figure, pixels_of
from ..images.fonts import with_families
from .analysis import PairOverlap, StackAnalysis

_MOST_PAIRS = 15  # those with the largest cosines


def stack_chart(analysis: StackAnalysis) -> np.ndarray:
    """uint8 [H, W, 3], 1200 px wide: shares of energy, and below them the cosines of the pairs, if there are any."""
    blocks = list(dict.fromkeys(block for lora in analysis.loras for block in lora.blocks))
    pairs = sorted(analysis.pairs, key=_strongest, reverse=True)[:_MOST_PAIRS]
    rows = [len(analysis.loras), len(pairs)] if pairs else [len(analysis.loras)]
    figure = new_figure(10, 1.8 + 0.34 * sum(rows) + 0.5 * len(rows))
    charts = figure.subplots(len(rows), 1, squeeze=False, sharex=True, height_ratios=rows)[:, 0]
    energies = [
        [lora.blocks[block].energy if block in lora.blocks else np.nan for block in blocks] for lora in analysis.loras
    ]
    title = "share of each LoRA's change"
    _heatmap(figure, charts[0], title, [lora.name for lora in analysis.loras], energies, ("Blues", 0, None, "{:.0%}"))
    if pairs:
        cosines = [
            [pair.blocks[block].cosine if block in pair.blocks else np.nan for block in blocks] for pair in pairs
        ]
        title = "cosine of two LoRAs' changes: red works against, blue does the same"
        names = [f"{pair.first} / {pair.second}" for pair in pairs]
        _heatmap(figure, charts[1], title, names, cosines, ("RdBu", -1, 1, "{:.2f}"))
    charts[-1].set_xticks(range(len(blocks)), blocks, rotation=40, ha="right", fontsize=8)
    return pixels_of(figure)


def _strongest(pair: PairOverlap) -> float:
    return max((abs(overlap.cosine) for overlap in pair.blocks.values()), default=0.0)


def _heatmap(
    figure: Any, axes: Any, title: str, names: list[str], values: list[list[float]], style: tuple[str, float, Any, str]
) -> None:
    """`style` is the color map, its range, and the format of a cell's number."""
    colors, low, high, number = style
    drawn = axes.imshow(np.array(values), cmap=colors, vmin=low, vmax=high, aspect="auto")
    axes.set_title(title, fontsize=9, loc="left")
    shortened = [name if len(name) <= 44 else f"{name[:43]}\u2026" for name in names]
    labels, families = with_families("\n".join(shortened))
    axes.set_yticks(range(len(names)), labels.split("\n"), fontsize=8, fontfamily=families)
    for row, cells in enumerate(values):
        for column, value in enumerate(cells):
            if np.isfinite(value):
                red, green, blue, _ = drawn.cmap(drawn.norm(value))
                ink = "white" if 0.3 * red + 0.6 * green + 0.1 * blue < 0.5 else "black"
                axes.text(column, row, number.format(value), ha="center", va="center", fontsize=7, color=ink)
