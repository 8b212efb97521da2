"""What the page sees while a node works: pictures on the way, where it stands, the time left."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def watched(server: Any, comfyui_python: str, tmp_path: Path) -> dict[str, Any]:
    base = {"class_type": "LoadSDXLBase", "inputs": {"base": "tiny-sdxl (bundled)", "precision": "auto"}}
    settings = {
        "base": ["base", 0],
        "prompt": "a blue square",
        "negative_prompt": "",
        "seed": 11,
        "steps": 5,
        "guidance": 5.0,
        "width": 128,
        "height": 64,
        "count": 3,
        "sampler": "dpmpp_2m",
        "scheduler": "karras",
        "cache": "off",
        "batch_size": 2,
        "hires_scale": 2.0,
        "hires_steps": 2,
    }
    workflow = {"base": base, "picture": {"class_type": "SDXLGenerateCached", "inputs": settings}}
    file = tmp_path / "workflow.json"
    file.write_text(json.dumps(workflow))
    command = [comfyui_python, str(Path(__file__).with_name("watch.py")), server.url, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_pictures_and_the_time_left_are_shown(watched: dict[str, Any]) -> None:
    assert watched["end"] == "execution_success"
    total = 3 * (5 + 2)
    counts = [re.match(rf"generating: (\d+) of {total}\b", text) for text in watched["texts"]]
    numbers = [int(found[1]) for found in counts if found]
    assert numbers == sorted(numbers) and numbers[-1] == total
    for which in ("image 3 of 3, step [1-5] of 5", "second pass: image 3 of 3, step [12] of 2"):
        assert any(re.search(rf"\n{which}, \d\d:\d\d left$", text) for text in watched["texts"]), watched["texts"]
    # ComfyUI enlarges them to 512 px: a batch of two, side by side, and one image alone.
    sizes = {tuple(picture[:2]) for picture in watched["pictures"]}
    assert sizes == {(512, 128), (512, 256)}, watched["pictures"]
    assert len(watched["pictures"]) == 2 * (5 + 2)
    assert all(spread > 20 for *_, spread in watched["pictures"]), "no picture is of one colour"
