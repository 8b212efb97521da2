"""The node LoRA Stack Report on the bundled LoRAs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools.run_workflow import load_pack

NODE: Any = load_pack().NODE_CLASS_MAPPINGS["StackReport"]
STYLE = "8bit_style (bundled)"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDXL_LORA_HOME", str(tmp_path))


def test_a_stack_goes_through_and_is_described_with_a_chart() -> None:
    stack = [(STYLE, 1.0, 1.0), ("line_style (bundled)", 0.8, 1.0)]
    shown = NODE().report(stack)
    passed, chart, report = shown["result"]
    assert passed == stack and chart.shape[0] == 1 and chart.shape[2:] == (1200, 3)
    (pair,) = json.loads(report)["pairs"]
    assert (pair["first"], pair["second"]) == (STYLE, "line_style (bundled)")
    assert (
        shown["ui"]["text"][0].startswith("No two LoRAs work against each other.") and len(shown["ui"]["images"]) == 1
    )


def test_a_lora_against_its_negative_is_named() -> None:
    shown = NODE().report([(STYLE, 1.0, 1.0), (STYLE, -1.0, -1.0)])
    (pair,) = json.loads(shown["result"][2])["pairs"]
    assert [pair["whole"][name] for name in ("cosine", "overlap", "opposed")] == pytest.approx([-1, 1, 1], abs=1e-5)
    assert f"{STYLE} (1) and {STYLE} (2) work against each other in" in shown["ui"]["text"][0]
    assert "and 15 more blocks" in shown["ui"]["text"][0]


def test_ten_loras_fit_into_a_chart() -> None:
    _, chart, report = NODE().report([(STYLE, 0.1 * number, 1.0) for number in range(1, 11)])["result"]
    assert len(json.loads(report)["pairs"]) == 45 and 800 < chart.shape[1] < 1500


def test_an_empty_stack_is_refused() -> None:
    with pytest.raises(ValueError, match="no LoRA of a strength other than 0"):
        NODE().report([])
