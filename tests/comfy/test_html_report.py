"""The page of a comparison in Chromium: zoom, the slider, and no part wider than a phone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_lora_core.evaluation.comparison import Cell, Comparison, Result
from sdxl_lora_core.evaluation.comparison_chart import comparison_chart
from sdxl_lora_core.evaluation.html_report import comparison_page
from sdxl_lora_core.evaluation.variants import Variant
from tests.comfy.page import browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    names, prompts, seeds = ("base", "strength 0.5 / steps 10", "strength 1 / steps 10"), ("a cat", "a dog"), (1, 2)
    results = [
        Result(
            Variant(name),
            tuple(
                Cell(np.full((64, 64, 3), 40 * place + 5 * number, np.uint8), prompts[number // 2], seeds[number % 2])
                for number in range(4)
            ),
            {"score": random.normal(20 + place, 1, (2, 2))},
        )
        for place, name in enumerate(names)
    ]
    found = Comparison(prompts, seeds, tuple(results), {"score": "the score"})
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(comparison_page(found, comparison_chart(found), "my comparison"), encoding="utf-8")
    return path


@pytest.fixture(params=[400, 1400])
def opened(request: pytest.FixtureRequest, report: Path) -> Any:
    with browser() as chromium:
        page = chromium.new_page(viewport={"width": request.param, "height": 900})
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda asked: problems.append(asked.url) if asked.url.startswith("http") else None)
        page.goto(report.as_uri())
        yield page
        assert problems == []


def test_nothing_is_wider_than_the_page(opened: Any) -> None:
    assert opened.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")


def test_a_click_on_an_image_shows_it_alone_with_its_names(opened: Any) -> None:
    opened.locator(".grid tbody tr").nth(1).locator("img").nth(1).click()
    assert opened.evaluate("() => document.getElementById('zoom').open")
    assert opened.locator("#zoom p").inner_text() == "strength 0.5 / steps 10 · a cat · seed 2"
    second = "document.querySelectorAll('.grid tbody tr')[1].querySelectorAll('img')[1].src"
    same = f"() => document.querySelector('#zoom img').src === {second}"
    assert opened.evaluate(same)
    opened.locator("#zoom img").click()
    opened.locator("#zoom img").click()
    assert not opened.evaluate("() => document.getElementById('zoom').open")


def test_the_slider_shows_two_variants_of_one_prompt(opened: Any) -> None:
    opened.locator("#left").select_option(label="base")
    opened.locator("#right").select_option(label="strength 1 / steps 10")
    opened.locator("#row").select_option(index=3)
    sources = """() => ["above", "below"].map((id) => document.getElementById(id).src)"""
    cells = """() => [0, 2].map((i) => document.querySelectorAll('.grid tbody tr')[3].querySelectorAll('img')[i].src)"""
    assert opened.evaluate(sources) == opened.evaluate(cells)
    box = opened.locator("#slider").bounding_box()
    opened.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 10)
    clip = opened.evaluate("() => document.getElementById('above').style.clipPath")
    assert abs(float(clip.split()[1].removesuffix("%")) - 75) < 1
