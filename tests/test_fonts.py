"""Names and captions in scripts that the usual fonts lack: in a font that has them, else as codes, never as boxes."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image

from sdxl_lora_core.images import fonts
from sdxl_lora_core.images.sheets import sheet, text_strip
from sdxl_lora_core.training.monitor.charts import plot_losses
from sdxl_lora_core.training.run.loop_state import LoopState

CAT = "\u732b"


@pytest.fixture
def western(monkeypatch: pytest.MonkeyPatch) -> None:
    """No font but matplotlib's own is installed."""
    monkeypatch.setattr(fonts, "FAMILIES", ("DejaVu Sans",))


@pytest.fixture
def eastern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a font with one letter, a full square."""
    pen = TTGlyphPen(None)
    for step, corner in enumerate([(0, 0), (0, 1000), (1000, 1000), (1000, 0)]):
        (pen.lineTo if step else pen.moveTo)(corner)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "cat"])
    builder.setupCharacterMap({ord(CAT): "cat"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "cat": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "cat": (1000, 0)})
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": "Of Cats", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "cats.ttf")
    known = font_manager.fontManager.ttflist
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [*known])
    font_manager.fontManager.addfont(tmp_path / "cats.ttf")
    monkeypatch.setattr(fonts, "FAMILIES", ("DejaVu Sans", "Of Cats"))


def chart(path: Path, title: str) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of letters that it draws as boxes
        plot_losses(path, title, LoopState(losses=[1.0, 0.5], learning_rates=[1e-4, 1e-4]))
    return np.asarray(Image.open(path).convert("L"))


@pytest.mark.usefixtures("western")
def test_letters_of_no_font_are_codes(tmp_path: Path) -> None:
    assert fonts.with_font(f"Möbel, \u0451 {CAT}", 20)[0] == "Möbel, \u0451 \\u732b"
    np.testing.assert_array_equal(chart(tmp_path / "a.png", CAT), chart(tmp_path / "b.png", "\\u732b"))
    np.testing.assert_array_equal(text_strip(200, [f"é{CAT}"], 20), text_strip(200, ["é\\u732b"], 20))


@pytest.mark.usefixtures("eastern")
def test_a_font_that_has_the_letters_is_used(tmp_path: Path) -> None:
    assert fonts.with_font(CAT, 20)[0] == CAT
    strip = np.asarray(text_strip(60, [CAT], 20))
    assert (strip < 50).all(axis=-1).sum() >= 18 * 18, "the square that the font has for it"
    assert (chart(tmp_path / "a.png", f"{CAT} style")[:40] < 50).sum() > 150
    cells = [(Image.new("RGB", (8, 8), "white"), CAT)]
    assert (np.asarray(sheet(cells, "footer")) < 50).all(axis=-1).sum() > 13 * 13


def test_ascii_stays_in_pillows_font() -> None:
    assert "DejaVu" not in str(fonts.with_font("plain", 20)[1].getname())


def test_a_font_that_is_gone_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """matplotlib's list of fonts is a file, which knows nothing of a font that was removed."""
    gone = font_manager.FontEntry(fname=str(tmp_path / "gone.ttc"), name="Gone", style="normal", weight=400)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [gone, *font_manager.fontManager.ttflist])
    monkeypatch.setattr(fonts, "FAMILIES", ("Gone", "DejaVu Sans"))
    assert [*fonts.installed()] == ["DejaVu Sans"]
    assert fonts.with_font("é", 20)[0] == "é"
    chart(tmp_path / "a.png", "é")


def test_without_any_font_letters_are_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "FAMILIES", ())
    assert fonts.with_font("é", 20)[0] == "\\xe9"
    chart(tmp_path / "a.png", "é")
