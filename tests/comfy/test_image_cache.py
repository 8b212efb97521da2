"""The image cache inside a real ComfyUI: what its PNGs say, and the node that shows it."""

from __future__ import annotations

import io
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

BASE = {"class_type": "LoadSDXLBase", "inputs": {"base": "tiny-sdxl (bundled)", "precision": "auto"}}
FORM = {"nodes": [], "secret": "/home/somebody/pictures/cat.png"}


def picture(**changes: Any) -> dict[str, Any]:
    inputs = {
        "base": ["base", 0],
        "prompt": "a green star",
        "negative_prompt": "",
        "seed": 99,
        "steps": 2,
        "guidance": 5.0,
        "width": 64,
        "height": 64,
        "count": 1,
        "sampler": "dpmpp_2m",
        "scheduler": "karras",
        "cache": "use",
        **changes,
    }
    return {"base": BASE, "picture": {"class_type": "SDXLGenerateCached", "inputs": inputs}}


def chunks(png: bytes) -> dict[str, Any]:
    with Image.open(io.BytesIO(png)) as image:
        return dict(image.info)


@pytest.fixture(scope="module")
def shown(server: Any) -> dict[str, Any]:
    """The preview that the page gets of an image whose graph was sent along, as the page sends it."""
    body = {"prompt": picture(), "extra_data": {"extra_pnginfo": {"workflow": FORM}}}
    entry = server.finished(server.post("/prompt", body)["prompt_id"])
    assert entry["status"]["status_str"] == "success", json.dumps(entry["status"], indent=1)
    return entry["outputs"]["picture"]["images"][0]


def test_preview_and_cached_png_say_how_they_were_made(server: Any, shown: dict[str, Any]) -> None:
    url = f"{server.url}/view?filename={shown['filename']}&subfolder={shown['subfolder']}&type={shown['type']}"
    with urllib.request.urlopen(url, timeout=30) as response:
        preview = chunks(response.read())
    cached = [chunks(file.read_bytes()) for file in server.base.glob("user/sdxl_lora/images/v1/*/*/image.png")]
    assert preview in cached
    assert json.loads(preview["workflow"]) == {"nodes": [], "secret": "cat.png"}
    assert json.loads(preview["prompt"])["picture"]["inputs"]["seed"] == 99
    assert preview["parameters"].startswith("a green star\nSteps: 2, Sampler: DPM++ 2M, ")
    assert "trainedAlgorithmicMedia" in preview["XML:com.adobe.xmp"]


def test_only_fails_by_name(server: Any, shown: dict[str, Any]) -> None:
    server.run(picture(cache="only", steps=2))
    assert "'a green star' with seed 100; set cache to 'use'" in server.failure(picture(cache="only", count=2))


def test_the_node_shows_the_cache(server: Any, shown: dict[str, Any]) -> None:
    def look(**inputs: Any) -> str:
        node = {"class_type": "SDXLImageCache", "inputs": {"action": "show", "limit_gb": 0.0, **inputs}}
        return server.run({"cache": node})["cache"]["text"][0]

    assert " GB of 10 GB\nlast used between " in look()
    assert "0 images removed" in look(action="prune", limit_gb=20.0) and " GB of 20 GB" in look()
    assert "0 damaged images removed" in look(action="verify")


def test_the_cache_lies_where_extra_model_paths_says(start_server: Callable[..., Any], tmp_path: Path) -> None:
    settings = tmp_path / "extra_model_paths.yaml"
    settings.write_text(f"shared:\n  base_path: {tmp_path}/disk\n  sdxl_lora_cache: sdxl_lora\n")
    with start_server(tmp_path / "comfy", "--extra-model-paths-config", str(settings)) as server:
        server.run(picture())
    assert {path.name for path in (tmp_path / "disk/sdxl_lora").iterdir()} >= {"images", "prompts", "hashes"}
    assert len(list((tmp_path / "disk/sdxl_lora/images").rglob("image.png"))) == 1
    assert not (tmp_path / "comfy/user/sdxl_lora").exists()
