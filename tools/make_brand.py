"""Draws the registry's icon and banner: a matrix as the product of a column and a row, which is what a LoRA is.

python -m tools.make_brand
"""

from __future__ import annotations

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from tools.run_workflow import ROOT

FOLDER = ROOT / "assets/brand"
PAPER, COLD, WARM, WHITE = (24, 38, 43), (44, 74, 82), (242, 166, 90), (240, 244, 245)
COLUMN = np.array([0.35, 0.9, 0.6, 1.0, 0.45])
ROW = np.array([1.0, 0.55, 0.85, 0.3, 0.7])
SCALE = 4  # drawn larger, for smooth edges


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    icon().save(FOLDER / "icon.png", optimize=True)
    banner().save(FOLDER / "banner.png", optimize=True)


def icon(side: int = 400) -> Image.Image:
    page = Image.new("RGB", (side * SCALE,) * 2, PAPER)
    draw_product(page, (0.1 * side, 0.1 * side), 0.8 * side)
    return page.resize((side, side), Image.Resampling.LANCZOS)


def banner(width: int = 1344, height: int = 576) -> Image.Image:
    page = Image.new("RGB", (width * SCALE, height * SCALE), PAPER)
    draw_product(page, (72, 72), height - 144)
    pen = ImageDraw.Draw(page)
    write(pen, "SDXL LoRA Nodes", (height, 196), 76, WHITE)
    write(pen, "train, stack, generate, measure", (height + 4, 310), 40, WARM)
    write(pen, "in ComfyUI", (height + 4, 366), 40, WHITE)
    return page.resize((width, height), Image.Resampling.LANCZOS)


def draw_product(page: Image.Image, corner: tuple[float, float], side: float) -> None:
    """The column on the left, the row above, and their product, whose cells are as bright as they are large."""
    cells = len(COLUMN) + 1
    size = side / (cells + 0.4)
    for line in range(cells):
        for place in range(cells):
            if not line and not place:
                continue
            left = corner[0] + size * (place + 0.4 * (place > 0))
            top = corner[1] + size * (line + 0.4 * (line > 0))
            value = (COLUMN[line - 1] if line else 1) * (ROW[place - 1] if place else 1)
            cell(page, (left, top), size, value, WARM if not (line and place) else WHITE)


def cell(page: Image.Image, corner: tuple[float, float], size: float, value: float, color: tuple[int, ...]) -> None:
    mixed = tuple(round(low + (high - low) * value) for low, high in zip(COLD, color, strict=True))
    left, top = (SCALE * (edge + 0.06 * size) for edge in corner)
    inner = SCALE * 0.88 * size
    ImageDraw.Draw(page).rounded_rectangle((left, top, left + inner, top + inner), 0.18 * inner, fill=mixed)


def write(pen: ImageDraw.ImageDraw, text: str, corner: tuple[float, float], size: int, color: tuple[int, ...]) -> None:
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size * SCALE)
    pen.text((corner[0] * SCALE, corner[1] * SCALE), text, font=font, fill=color)


if __name__ == "__main__":
    main()
