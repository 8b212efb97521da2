"""Reports as one HTML file each, with everything embedded: they open offline and can be mailed."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .comparison import Cell, Comparison
from .comparison_grid import grid_columns, grid_rows
from .comparison_report import sentences, table_rows

_TEMPLATES = Path(__file__).parent / "templates"
_QUALITY = 88
_MANY = 100  # images from which they are embedded smaller
_SIDE, _SMALL_SIDE = 1024, 512  # pixels of an embedded image's longer side


def comparison_page(comparison: Comparison, chart: np.ndarray | None, title: str) -> str:
    """The page of a comparison: its sentences, tables, chart and images, with zoom and a slider between variants.

    Images are JPEG of at most 1024 px, or 512 px if there are many; the image cache and the grid have every pixel.
    """
    cells = [cell for result in comparison.results for cell in result.cells if cell]
    side = _SMALL_SIDE if len(cells) > _MANY else _SIDE
    sources = {id(cell): embedded_jpeg(cell.pixels, side) for cell in cells}
    return render(
        "comparison.html",
        title=title,
        sentences=sentences(comparison),
        chart=None if chart is None else embedded_png(chart),
        tables=[_table(comparison, metric) for metric in comparison.titles],
        columns=grid_columns(comparison),
        rows=[
            {"label": row.label, "prompt": row.prompt, "seed": row.seed, "cells": _cells(row.cells, sources)}
            for row in grid_rows(comparison)
        ],
        prompts=len(comparison.prompts),
        seeds=len(comparison.seeds),
    )


def render(template: str, **values: Any) -> str:
    """A page of the folder `templates`. Texts are escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def embedded_jpeg(pixels: np.ndarray, side: int) -> str:
    """An image (uint8 [H, W, 3]) of at most `side` px as the source of an <img>."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return _source(image, "JPEG", quality=_QUALITY)


def embedded_png(pixels: np.ndarray) -> str:
    """A chart (uint8 [H, W, 3]) as the source of an <img>."""
    return _source(Image.fromarray(pixels), "PNG", optimize=True)


def _source(image: Image.Image, kind: str, **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _table(comparison: Comparison, metric: str) -> dict[str, Any]:
    rows = table_rows(comparison, metric)
    return {
        "title": comparison.titles[metric],
        "rows": rows,
        "bootstrap": any(row.get("bootstrap") for row in rows),
    }


def _cells(cells: tuple[Cell | None, ...], sources: Mapping[int, str]) -> list[str | None]:
    return [sources[id(cell)] if cell else None for cell in cells]
