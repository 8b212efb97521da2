"""Our parts under the memory management of a real ComfyUI."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.comfy.conftest import install_pack


@pytest.fixture(scope="module")
def seen(comfyui: Path, comfyui_python: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("memory")
    install_pack(home / "custom_nodes" / "sdxl-lora-nodes")
    command = [comfyui_python, str(Path(__file__).with_name("memory.py")), str(home)]
    done = subprocess.run(command, cwd=comfyui, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_what_is_on_the_device_is_evicted_before_what_rests_beside_it(seen: dict[str, Any]) -> None:
    assert seen["resting"] == ["text_encoders", "unet", "vae"]
    assert seen["another model"] == ["text_encoders", "vae"]  # whose eviction would have freed nothing


def test_unloading_releases_everything(seen: dict[str, Any]) -> None:
    assert seen["unloaded"] == []
