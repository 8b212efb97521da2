"""LoRAs on core's MODEL and CLIP in a real ComfyUI: our node against core's, and core's nodes on files that we save."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.comfy.narrow import EVERY_ATTENTION, EVERY_LAYER, EVERY_TEXT_LAYER

LORAS = [["unet.safetensors", 0.7, 0.0], ["text.safetensors", -0.5, 0.4]]
DORA = [["dora.safetensors", 1.0, 1.0]]
FORMATS = ("kohya", "peft", "comfyui")
ROUNDED = 2**-11  # of fp16, relative


# The question, asked once for all tests


def recipe(by: str, loras: list[Any], checkpoint: str = "narrow.safetensors") -> dict[str, Any]:
    return {"checkpoint": checkpoint, "by": by, "loras": loras}


def cases() -> dict[str, list[dict[str, Any]]]:
    """First what is taken for right, then what has to be the same."""
    kinds = {"text": LORAS[1:], "dora": [["dora.safetensors", 0.8, 0.6]], "stack": LORAS}
    blocks = recipe("ours", [["unet.safetensors", 0.8, 0.0, "mid_block=0, up_blocks.0=0.5"]])
    asked = {f"node {name}": [recipe("core", loras), recipe("ours", loras)] for name, loras in kinds.items()}
    for factor in (0.0, 0.5, 1.0):
        asked[f"blocks {factor}"] = [recipe("core", [["unet.safetensors", 0.8 * factor, 0.0]]), blocks]
    for format, by in [("kohya", "core"), ("comfyui", "core"), ("peft", "core"), ("peft", "ours")]:
        asked[f"saved {format} {by}"] = [recipe("core", LORAS), recipe(by, [[f"{format}.safetensors", 1.0, 1.0]])]
    for format in ("kohya", "comfyui"):
        asked[f"saved dora {format}"] = [
            recipe("core", DORA),
            recipe("core", [[f"dora_{format}.safetensors", 1.0, 1.0]]),
        ]
    asked["merged"] = [recipe("core", LORAS), recipe("core", [["merged.safetensors", 1.0, 1.0]])]
    asked["base"] = [recipe("core", LORAS), recipe("core", [], "merged_base.safetensors")]
    return asked


def calls() -> list[Any]:
    """Our saving nodes."""
    saved = [
        ["SaveSDXLLoRA", {"lora_name": format, "format": format, "precision": "fp32", "lora_stack": LORAS}]
        for format in FORMATS
    ]
    saved += [
        ["SaveSDXLLoRA", {"lora_name": f"dora_{format}", "format": format, "precision": "fp32", "lora_stack": DORA}]
        for format in ("kohya", "comfyui")
    ]
    merged = {"lora_name": "merged", "method": "concatenate", "rank": 32, "precision": "fp32", "lora_stack": LORAS}
    base = {
        "base": "narrow",
        "lora_stack": LORAS,
        "base_name": "merged_base",
        "layout": "single_file",
        "precision": "fp16",
    }
    return [*saved, ["MergeLoRAs", merged], ["SaveMergedBase", base]]


@pytest.fixture(scope="module")
def answers(narrow_home: Path, comfyui: Path, comfyui_python: str) -> dict[str, Any]:
    request = narrow_home / "request.json"
    request.write_text(json.dumps({"calls": calls(), "cases": cases()}))
    script = Path(__file__).with_name("core_nodes.py")
    command = [comfyui_python, str(script), str(narrow_home), str(request)]
    done = subprocess.run(command, cwd=comfyui, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def worst(answer: dict[str, Any], *beginnings: str) -> float:
    return max(error for key, error in answer["errors"].items() if key.startswith(beginnings or ""))


# What has to be


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("text", EVERY_ATTENTION + EVERY_TEXT_LAYER),
        ("dora", EVERY_ATTENTION + EVERY_TEXT_LAYER),
        ("stack", EVERY_LAYER + EVERY_TEXT_LAYER),
    ],
)
def test_our_node_puts_on_the_weights_of_cores_loader(answers: dict[str, Any], name: str, modules: int) -> None:
    answer = answers[f"node {name}"]
    assert answer["patched"] == [modules, modules] and answer["complaints"] == [[], []]
    assert min(answer["changes"].values()) > 0.01, "a module does nothing"
    assert worst(answer) == 0


def test_strengths_by_block(answers: dict[str, Any]) -> None:
    off, half, whole = (answers[f"blocks {factor}"] for factor in (0.0, 0.5, 1.0))
    up = ("diffusion_model.output_blocks.0.", "diffusion_model.output_blocks.1.", "diffusion_model.output_blocks.2.")
    named = (*up, "diffusion_model.middle_block.")
    assert not [key for key in off["errors"] if key.startswith(named[-1])], "patched though it is off"
    assert worst(half, *up) == 0
    others = {key: error for key, error in whole["errors"].items() if not key.startswith(named)}
    assert len(others) > 300 and max(others.values()) == 0
    assert min(worst(whole, up[0]), worst(whole, named[-1]), worst(half, "diffusion_model.input_blocks.")) > 0.01


@pytest.mark.parametrize("format", ["kohya", "comfyui"])
def test_core_reads_what_we_save(answers: dict[str, Any], format: str) -> None:
    """A stack of two becomes one file, whose every key core applies."""
    answer = answers[f"saved {format} core"]
    assert answer["patched"] == [EVERY_LAYER + EVERY_TEXT_LAYER] * 2 and answer["complaints"] == [[], []]
    assert worst(answer) <= 1e-6 < min(answer["changes"].values())


def test_pefts_names_are_all_read_by_our_node(answers: dict[str, Any], narrow_home: Path) -> None:
    """Core's loader does not know those of attention, and says so in its log, as our help does."""
    every = EVERY_LAYER + EVERY_TEXT_LAYER
    with safe_open(narrow_home / "output/loras/peft.safetensors", framework="pt") as file:
        assert len(file.keys()) == 2 * every
    answer, core = answers["saved peft ours"], answers["saved peft core"]
    assert answer["patched"] == [every, every]
    assert worst(answer) <= 1e-6
    assert len(core["complaints"][1]) == 2 * (every - core["patched"][1])
    assert all(".attn" in key for key, error in core["errors"].items() if error > 1e-6)


@pytest.mark.parametrize("format", ["kohya", "comfyui"])
def test_core_reads_a_dora_that_we_save(answers: dict[str, Any], format: str) -> None:
    answer = answers[f"saved dora {format}"]
    assert answer["patched"] == [EVERY_ATTENTION + EVERY_TEXT_LAYER] * 2 and answer["complaints"] == [[], []]
    assert worst(answer) <= 1e-6 < min(answer["changes"].values())


def test_core_reads_what_we_merge(answers: dict[str, Any]) -> None:
    answer = answers["merged"]
    assert answer["patched"] == [EVERY_LAYER + EVERY_TEXT_LAYER] * 2 and answer["complaints"] == [[], []]
    assert worst(answer) <= 1e-6 < min(answer["changes"].values())


def test_core_reads_a_base_that_we_merge(answers: dict[str, Any]) -> None:
    """Every weight, whether a LoRA changed it or not, rounded once."""
    answer = answers["base"]
    changed = [key for key, change in answer["changes"].items() if change > 0.01]
    assert len(changed) == EVERY_LAYER + EVERY_TEXT_LAYER // 4 < len(answer["errors"])  # a fourth is looked at
    assert worst(answer) <= ROUNDED
    assert answer["complaints"] == [[], []]
