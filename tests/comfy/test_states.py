"""The nodes leave a real ComfyUI's process as it was, also when they fail in the middle of their work."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.full_size import write_pictures
from sdxl_lora_core.sdxl.base import open_base
from tests.comfy.conftest import ROOT, install_pack
from tests.micro.controls import random_net, save_single
from tests.micro.sd15 import write_micro_sd15
from tools.run_workflow import load_pack

NODES = sorted(load_pack().NODE_CLASS_MAPPINGS)
SMALL_CORE = Path(__file__).with_name("small_core")
CANCELLED = {
    *("TrainSDXLLoRA", "SDXLGenerateCached", "SDXLImageCache", "SaveSDXLLoRA", "MergeLoRAs", "SaveMergedBase"),
    *(
        "CaptionImages",
        "CLIPScore",
        "ImageSimilarity",
        "DistributionMetrics",
        "CompareLoRAs",
        "PickCheckpoint",
        "FindStrength",
        "HumanCompare",
    ),
}
ENDINGS = {
    "finishes for the first time": "finishes",
    "finishes": "finishes",
    "fails at 20%": "fails",
    "fails at 50%": "fails",
    "fails at 80%": "fails",
    "is cancelled": "is cancelled",
}


@pytest.fixture(scope="module")
def left(comfyui: Path, comfyui_python: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("states")
    install_pack(home / "custom_nodes/sdxl-lora-nodes")
    shutil.copytree(SMALL_CORE, home / "custom_nodes/small_core")
    (home / "models/controlnet").mkdir(parents=True)
    net = random_net(open_base(ROOT / "assets/tiny-sdxl", "fp32"), 1)
    save_single(home / "models/controlnet/edges.safetensors", net)
    write_pictures(home / "input/two", 64, 2)
    write_pictures(home / "input/captioned", 64, 2)
    write_micro_sd15(home / "models/diffusers/micro-sd15")
    command = [comfyui_python, str(Path(__file__).with_name("states.py")), str(home)]
    done = subprocess.run(command, cwd=comfyui, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Exception ignored" not in done.stderr, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("node", NODES)
def test_the_process_is_as_it_was(left: dict[str, Any], node: str, ending: str) -> None:
    ended = "finishes" if ending == "is cancelled" and node not in CANCELLED else ENDINGS[ending]
    stays = node != "TrainSDXLLoRA"  # which asks ComfyUI's models to leave
    assert left[node][ending] == {"ended": ended, "changed": [], "ComfyUI's model": stays, "in use": []}
