"""The images of a comparison as one labelled grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from ..images.fonts import with_font
from ..images.sheets import wrap
from .comparison import Cell, Comparison, Result

LARGEST = 8192  # pixels of the grid's longer side; larger images are scaled down to fit
_SMALLEST = 96  # pixels of a cell
_INK, _PAPER, _FAINT = (24, 24, 24), (255, 255, 255), (232, 232, 232)


@dataclass(frozen=True)
class GridRow:
    """One row of cells: the label of the row axis, the prompt and the seed, and an image for each column."""

    label: str
    prompt: str
    seed: int
    cells: tuple[Cell | None, ...]


def grid_columns(comparison: Comparison) -> list[str]:
    """The headers: the base, the values of the column axis, and variants that are on no axis."""
    return list(dict.fromkeys(_column(result) for result in comparison.results))


def grid_rows(comparison: Comparison) -> Iterator[GridRow]:
    """For each prompt, seed and value of the row axis the images of all columns.

    A variant that is not on the row axis, such as the base, is repeated in every row.
    """
    columns = grid_columns(comparison)
    labels = list(dict.fromkeys(r.variant.row for r in comparison.results if r.variant.row)) or [""]
    by_place = {(result.variant.row, _column(result)): result for result in comparison.results}
    number = 0
    for prompt in comparison.prompts:
        for seed in comparison.seeds:
            for label in labels:
                found = [by_place.get((label, column)) or by_place.get(("", column)) for column in columns]
                yield GridRow(label, prompt, seed, tuple(result and result.cells[number] for result in found))
            number += 1


def comparison_grid(comparison: Comparison) -> np.ndarray:
    """uint8 [H, W, 3]: images in their own size, or scaled down so that the longer side is at most 8192 px.

    The text grows with the cells, so that it can be read when the grid is shrunk to a screen.
    """
    columns, rows = grid_columns(comparison), list(grid_rows(comparison))
    pixels = [cell.pixels for row in rows for cell in row.cells if cell]
    height, width = (max(image.shape[axis] for image in pixels) for axis in (0, 1))
    scale = min(1.0, LARGEST / (len(columns) * width), LARGEST / (len(rows) * height))
    width, height = max(_SMALLEST, round(width * scale)), max(_SMALLEST, round(height * scale))
    return _Page(columns, rows, width, height).drawn()


class _Page:
    """The grid on paper: a header above, labels on the left."""

    def __init__(self, columns: Sequence[str], rows: Sequence[GridRow], width: int, height: int) -> None:
        self.columns, self.rows, self.width, self.height = columns, rows, width, height
        self.text = max(12, min(width, height) // 16)
        self.gap = max(2, self.text // 4)
        self.left = max(round(2.2 * width / 3), 10 * self.text)
        self.top = round(3.2 * self.text)

    def drawn(self) -> np.ndarray:
        size = (
            self.left + len(self.columns) * (self.width + self.gap),
            self.top + len(self.rows) * (self.height + self.gap),
        )
        self.page = Image.new("RGB", size, _PAPER)
        for number, title in enumerate(self.columns):
            self._write(title, (self._x(number), self.gap), self.width, lines=2)
        for number, row in enumerate(self.rows):
            self._draw_row(row, self.top + number * (self.height + self.gap), self._is_new_prompt(number))
        return np.asarray(self.page)

    def _x(self, column: int) -> int:
        return self.left + column * (self.width + self.gap)

    def _is_new_prompt(self, number: int) -> bool:
        return number == 0 or self.rows[number - 1].prompt != self.rows[number].prompt

    def _draw_row(self, row: GridRow, top: int, with_prompt: bool) -> None:
        lines = [row.label] if row.label else []
        lines += [f"seed {row.seed}"]
        room = max(1, int(self.height / (1.25 * self.text)) - len(lines))
        y = top
        if with_prompt:
            y = self._write(row.prompt, (self.gap, y), self.left - 2 * self.gap, lines=room)
        for line in lines:
            y = self._write(line, (self.gap, y), self.left - 2 * self.gap, lines=1)
        for number, cell in enumerate(row.cells):
            self._paste(cell, (self._x(number), top))

    def _paste(self, cell: Cell | None, corner: tuple[int, int]) -> None:
        if cell is None:
            ImageDraw.Draw(self.page).rectangle(
                (*corner, corner[0] + self.width - 1, corner[1] + self.height - 1), fill=_FAINT
            )
            return
        image = Image.fromarray(cell.pixels)
        scale = min(self.width / image.width, self.height / image.height, 1.0)
        if scale < 1:
            size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
            image = image.resize(size, Image.Resampling.LANCZOS)
        self.page.paste(image, corner)

    def _write(self, text: str, corner: tuple[int, int], width: int, lines: int) -> int:
        """Writes text in at most `lines` lines; returns the y below it."""
        drawable, font = with_font(text, self.text)
        x, y = corner
        for line in wrap(drawable, font, width, max_lines=lines):
            ImageDraw.Draw(self.page).text((x, y), line, fill=_INK, font=font)
            y += round(1.25 * self.text)
        return y


def _column(result: Result) -> str:
    """The header of a result: its value on the column axis; on the row axis only, the stack; else its name."""
    variant = result.variant
    if variant.column:
        return variant.column
    return "LoRA" if variant.row else variant.name
