"""Fonts for text in images. No font has every script, so a text gets the first one that has its letters."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# matplotlib's own, and fonts for Chinese, Japanese and Korean that systems come with, or that are installed for them.
FAMILIES = (
    *("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans CJK KR", "Noto Sans JP", "Noto Sans SC"),
    *("Noto Sans KR", "Source Han Sans", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback"),
    *("Microsoft YaHei", "SimHei", "Yu Gothic", "Meiryo", "MS Gothic", "Malgun Gothic"),
    *("Hiragino Sans", "Hiragino Sans GB", "PingFang SC", "Apple SD Gothic Neo", "Arial Unicode MS"),
)


def with_font(text: str, size: int) -> tuple[str, Font]:
    """The text and a font of `size` px: Pillow's own for ASCII, else the installed one with most of the letters.

    Letters that it lacks are replaced by their codes, such as \\u732b.
    """
    if text.isascii():
        return text, ImageFont.load_default(size)
    letters = {ord(letter) for letter in text if not letter.isascii()}
    path = max(installed().values(), key=lambda path: len(letters & _letters(path)), default=None)
    if path is None:
        return _drawable(text, []), ImageFont.load_default(size)
    return _drawable(text, [path]), ImageFont.truetype(str(path), size)


def with_families(text: str) -> tuple[str, list[str]]:
    """The text and the families from which matplotlib takes its letters. Letters of none are replaced as above."""
    fonts = {} if text.isascii() else installed()
    return _drawable(text, fonts.values()), [*fonts] or ["sans-serif"]


def installed() -> dict[str, Path]:
    """The files of FAMILIES that are installed, in their order. matplotlib's list may name some that are gone."""
    from matplotlib.font_manager import fontManager

    files: dict[str, Path] = {}
    for font in fontManager.ttflist:
        if font.style == "normal" and font.weight == 400:
            files.setdefault(font.name, Path(font.fname))
    return {family: files[family] for family in FAMILIES if family in files and _letters(files[family])}


def _drawable(text: str, fonts: Iterable[Path]) -> str:
    known: set[int] = set().union(*map(_letters, fonts))
    return "".join(
        letter if letter.isascii() or ord(letter) in known else letter.encode("ascii", "backslashreplace").decode()
        for letter in text
    )


@functools.cache
def _letters(path: Path) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(str(path)).get_charmap())
    except (OSError, RuntimeError):  # gone, or in a format of its own
        return frozenset()
