"""Contact sheets: images in a grid with text below them, and strips of text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from .fonts import Font, with_font

_INK, _PAPER, _FAINT = (24, 24, 24), (255, 255, 255), (120, 120, 120)
_LINE_HEIGHT = 1.35
CELL = 256


def text_strip(width: int, lines: Sequence[str], size: int) -> Image.Image:
    """An image of lines of text on white, `size` px high each, cut to `width` px with an ellipsis."""
    strip = Image.new("RGB", (width, strip_height(len(lines), size)), _PAPER)
    draw, margin = ImageDraw.Draw(strip), size // 3
    for number, line in enumerate(lines):
        text, font = with_font(line, size)
        text = wrap(text, font, width - 2 * margin, max_lines=1)
        draw.text((margin, margin + number * size * _LINE_HEIGHT), "".join(text), fill=_INK, font=font)
    return strip


def strip_height(lines: int, size: int) -> int:
    return round(lines * size * _LINE_HEIGHT) + 2 * (size // 3)


def wrap(text: str, font: Font, width: int, max_lines: int) -> list[str]:
    """Splits text into lines of at most `width` px, between words where possible, with an ellipsis where it is cut."""
    lines, rest = [], text.strip()
    while rest and len(lines) < max_lines:
        line = _longest_fit(rest, font, width)
        if len(line) < len(rest) and len(lines) == max_lines - 1:
            line = _longest_fit(rest, font, width - math.ceil(font.getlength("…"))).rstrip(" ,") + "…"
            lines.append(line)
            break
        lines.append(line.rstrip())
        rest = rest[len(line) :].lstrip()
    return lines


def fit(image: Image.Image, side: int) -> Image.Image:
    """Scales an image so that its longer side is `side` px."""
    scale = side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    # Nearest neighbor when enlarging: a blurred thumbnail would hide that the image is small.
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def sheet(cells: Sequence[tuple[Image.Image, str]], footer: str, cell: int = CELL, text_size: int = 15) -> Image.Image:
    """Images in a grid, each fitted into `cell` x `cell` px with its text in up to four lines below."""
    columns = min(6, max(1, round(math.sqrt(1.5 * len(cells)))))
    gap, text_height = cell // 16, strip_height(4, text_size)
    rows = math.ceil(len(cells) / columns)
    width, row_height = gap + columns * (cell + gap), cell + text_height + gap
    page = Image.new("RGB", (width, gap + rows * row_height + strip_height(1, text_size)), _PAPER)
    for number, (image, caption) in enumerate(cells):
        left, top = gap + number % columns * (cell + gap), gap + number // columns * row_height
        text, font = with_font(caption, text_size)
        _paste_cell(page, image, wrap(text, font, cell, max_lines=4), (left, top), cell, font)
    draw = ImageDraw.Draw(page)
    text, font = with_font(footer, text_size)
    draw.text(
        (gap, page.height - strip_height(1, text_size)),
        "".join(wrap(text, font, width - 2 * gap, 1)),
        fill=_FAINT,
        font=font,
    )
    return page


def _paste_cell(
    page: Image.Image, image: Image.Image, lines: Sequence[str], corner: tuple[int, int], cell: int, font: Font
) -> None:
    left, top = corner
    thumbnail = fit(image, cell)
    page.paste(thumbnail, (left + (cell - thumbnail.width) // 2, top + (cell - thumbnail.height) // 2))
    line_height = font.getbbox("Ag")[3] * _LINE_HEIGHT
    for number, line in enumerate(lines):
        ImageDraw.Draw(page).text((left, top + cell + 6 + number * line_height), line, fill=_INK, font=font)


def _longest_fit(text: str, font: Font, width: int) -> str:
    """The longest start of `text` of at most `width` px: whole words if possible, else at least one character."""
    if font.getlength(text) <= width:
        return text
    low, high = 1, len(text)
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle)
    space = text.rfind(" ", 0, low + 1)
    return text[:space] if space > 0 else text[:low]
