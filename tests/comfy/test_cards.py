"""What nodes show beside their results: the card of a LoRA, the table of scores, the badges of images."""

from __future__ import annotations

import json
import secrets
import shutil
import urllib.error
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.comfy.page import open_workflow, run_to_end, set_widgets

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = "8bit_style (bundled)"
CARD = "() => document.querySelector('.sdxl-lora-card')?.textContent ?? ''"
HOSTILE = ["", "..", "../../output/x", "/etc/passwd", "C:\\x", "a\0b", "con", "a" * 5000, "tiny-sdxl (bundled)"]


@pytest.fixture(scope="module")
def with_picture(server: Any) -> str:
    folder = server.base / "models/loras"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "assets/loras/8bit_style.safetensors", folder / "pictured.safetensors")
    Image.new("RGB", (8, 8), "red").save(folder / "pictured.png")
    return "pictured.safetensors"


def answer(server: Any, path: str) -> tuple[int, str]:
    try:
        return 200, json.dumps(server.get(path))
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_routes_give_what_the_node_offers_and_nothing_else(server: Any, with_picture: str) -> None:
    card = server.get(f"/sdxl_lora/lora?name={with_picture}")
    assert card["name"] == with_picture and card["picture"] is True
    assert any("rank" in line for line in card["lines"])
    assert server.get("/sdxl_lora/lora?name=8bit_style%20(bundled)")["picture"] is False
    for name in HOSTILE:
        quoted = urllib.parse.quote(name)
        for route in ("lora", "lora_picture"):
            status, told = answer(server, f"/sdxl_lora/{route}?name={quoted}")
            assert status == 404 and len(json.loads(told)["error"]) > 15, (route, name, told)


def test_a_card_is_shown_on_choosing(page: Any, with_picture: str) -> None:
    open_workflow(page, "generate_with_lora_stack")
    page.wait_for_function(f"() => ({CARD})().includes('rank')", timeout=20_000)
    assert "rank" in page.evaluate(CARD)
    page.evaluate(
        """(name) => {
          const node = window.app.graph._nodes.find((one) => one.type === "LoadLoRA");
          const widget = node.widgets.find((one) => one.name === "lora_name");
          widget.value = name;
          widget.callback?.(name);
        }""",
        with_picture,
    )
    loaded = "() => [...document.querySelectorAll('.sdxl-lora-card img')].some((one) => one.naturalWidth === 8)"
    page.wait_for_function(loaded, timeout=20_000)


def test_badges_say_which_images_came_from_the_cache(
    page: Any, server: Any, shipped: dict[str, Any], shrink: Callable[..., Any]
) -> None:
    badges = """() => [...document.querySelectorAll('.sdxl-lora-badges')]
      .map((panel) => [...panel.children].map((one) => one.className).join())"""
    seed = secrets.randbits(32)
    open_workflow(page, "generate_with_lora_stack")
    for count, expected in [(1, ["sdxl-lora-made"] * 4), (2, ["sdxl-lora-hit", "sdxl-lora-made"] * 4)]:
        changes = {"width": 64, "height": 64, "seed": seed, "count": count, "steps": 1}
        set_widgets(page, shrink(shipped["generate_with_lora_stack"], SDXLGenerateCached=changes))
        run_to_end(page, server)
        each = f"(words) => ({badges})().length && ({badges})().every((found) => found === words.join())"
        page.wait_for_function(each, arg=expected, timeout=20_000)


def test_scores_are_a_table_that_can_be_sorted(
    page: Any, server: Any, shipped: dict[str, Any], shrink: Callable[..., Any]
) -> None:
    open_workflow(page, "score_images")
    set_widgets(page, shrink(shipped["score_images"], SDXLGenerateCached={"count": 2, "steps": 1}))
    run_to_end(page, server)
    column = """(number) => [...document.querySelectorAll('.sdxl-lora-table tbody tr')]
      .map((row) => row.children[number].textContent)"""
    page.wait_for_function("() => document.querySelectorAll('.sdxl-lora-table tbody tr').length > 1", timeout=30_000)
    ranks = page.evaluate(column, 0)
    assert ranks == sorted(ranks, key=int)
    page.evaluate("() => document.querySelector('.sdxl-lora-table th').click()")
    assert page.evaluate(column, 0) == ranks[::-1]
