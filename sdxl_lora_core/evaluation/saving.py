"""Saves a comparison as one folder: HTML page, grid, chart, CSV and JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..files import check_name, claim_name, write_atomic, write_text_atomic
from .comparison import Comparison
from .comparison_chart import comparison_chart
from .comparison_grid import comparison_grid
from .comparison_report import to_csv, to_json
from .html_report import comparison_page


@dataclass(frozen=True)
class SavedComparison:
    """The folder of a comparison with what it holds: grid and chart (uint8 [H, W, 3]; no chart without scores), the
    report as JSON, and the images as CSV."""

    folder: Path
    grid: np.ndarray
    chart: np.ndarray | None
    report: str
    images: str

    @property
    def page(self) -> Path:
        return self.folder / "report.html"


def save_comparison(comparison: Comparison, root: Path, name: str, report: str = "") -> SavedComparison:
    """Writes report.html, grid.png, chart.png, images.csv and report.json to the next free folder `root/name`.

    `report` replaces the comparison's own JSON. Raises ValueError for a name that is no file name, OSError if the
    folder cannot be written to.
    """
    folder = claimed_folder(root, name)
    chart = comparison_chart(comparison) if comparison.titles else None
    grid, report = comparison_grid(comparison), report or to_json(comparison)
    saved = SavedComparison(folder, grid, chart, report, to_csv(comparison))
    write_text_atomic(saved.page, comparison_page(comparison, chart, name))
    write_text_atomic(saved.folder / "report.json", saved.report)
    write_text_atomic(saved.folder / "images.csv", saved.images)
    for file, pixels in {"grid.png": saved.grid, "chart.png": chart}.items():
        if pixels is not None:
            write_atomic(saved.folder / file, png_writer(pixels))
    return saved


def png_writer(pixels: np.ndarray) -> Callable[[Path], object]:
    """What write_atomic takes to write an image (uint8 [H, W, 3])."""
    return lambda path: Image.fromarray(pixels).save(path, format="PNG", compress_level=4)


def claimed_folder(root: Path, name: str) -> Path:
    """Makes the next free folder `root/name`, `root/name_00002` and so on. Raises ValueError for an invalid name."""
    check_name("save_as", name, subfolders=True)

    def claim(candidate: str) -> Path | None:
        folder = root / candidate
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            return None
        return folder

    return claim_name(name, claim)
