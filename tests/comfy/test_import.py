"""What importing the pack adds to a real ComfyUI. benchmarks/start_report.py measures the time."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.comfy.conftest import ROOT, install_pack

SMALL_CORE = Path(__file__).with_name("small_core")
CODE = """
import asyncio, json, sys
sys.path.insert(0, "")
import comfy.options
comfy.options.enable_args_parsing()
import utils.extra_config  # as main.py does: from nodes on, `utils` would be another
import nodes
def libraries():
    return {name.partition(".")[0] for name in sys.modules if "sdxl-lora-nodes" not in name} - sys.stdlib_module_names
def load(pack):
    assert asyncio.run(nodes.load_custom_node(pack, module_parent="custom_nodes"))
load(ANOTHER)  # for which ComfyUI imports libraries of its own
before, offered = libraries(), len(nodes.NODE_CLASS_MAPPINGS)
load(PACK)
print(json.dumps([len(nodes.NODE_CLASS_MAPPINGS) - offered, sorted(libraries() - before)]))
"""


def test_the_pack_imports_no_library_that_comfyui_has_not(comfyui: Path, comfyui_python: str, tmp_path: Path) -> None:
    """Each would be on its line of the start report: diffusers and peft take seconds."""
    pack = tmp_path / "custom_nodes/sdxl-lora-nodes"
    install_pack(pack)
    code = CODE.replace("PACK", repr(str(pack))).replace("ANOTHER", repr(str(SMALL_CORE)))
    command = [comfyui_python, "-c", code, "--cpu", "--base-directory", str(tmp_path)]
    done = subprocess.run(command, cwd=comfyui, capture_output=True, text=True, check=True)
    offered, libraries = json.loads(done.stdout.splitlines()[-1])
    assert offered and libraries == []


def test_it_works_below_folders_with_spaces_other_letters_and_long_names(start_server: Any, tmp_path: Path) -> None:
    """Trains, generates and finds both again. Windows' own paths are in tests/test_files.py and tests/nodes."""
    home = tmp_path / "My ComfyUI (Kopie)" / "r\u00e4ume \u7a7a\u767d" / ("long " * 12).strip()
    (home / "input/mein Datensatz \u732b").mkdir(parents=True)
    for path in (ROOT / "assets/sample-dataset/images").glob("0*.png"):
        caption = path.parent.parent / "captions" / f"{path.stem}.txt"
        for file in (path, caption):
            (home / "input/mein Datensatz \u732b" / f"{file.stem} \u00fc{file.suffix}").write_bytes(file.read_bytes())
    data = {"folder": "mein Datensatz \u732b", "trigger_word": "", "resolution": 64, "validation_percent": 0}
    train = {"base": ["1", 0], "dataset": ["2", 0], "lora_name": "estilo \u732b", "steps": 2, "learning_rate": 1e-3}
    train |= {"rank": 2, "alpha": 2.0, "batch_size": 1, "seed": 0, "sample_prompts": ""}
    image = {"base": ["1", 0], "prompt": "a star", "negative_prompt": "", "seed": 1, "steps": 1, "guidance": 1.0}
    image |= {"width": 64, "height": 64, "count": 1, "sampler": "euler", "scheduler": "normal", "cache": "use"}
    graph = {
        "1": {"class_type": "LoadSDXLBase", "inputs": {"base": "tiny-sdxl (bundled)", "precision": "auto"}},
        "2": {"class_type": "LoadCaptionDataset", "inputs": data},
        "3": {"class_type": "TrainSDXLLoRA", "inputs": train},
        "4": {"class_type": "SDXLGenerateCached", "inputs": {**image, "lora_stack": ["3", 0]}},
    }
    with start_server(home) as server:
        assert "1 image, 0 from the cache" in server.run(graph)["4"]["text"][0]
        assert (home / "output/loras/estilo \u732b.safetensors").is_file()
        names = server.get("/object_info/LoadLoRA")["LoadLoRA"]["input"]["required"]["lora_name"][0]
        assert "estilo \u732b.safetensors" in names
        graph["4"]["inputs"]["prompt"] = "a moon"
        assert (
            "9 images" in server.run(graph)["2"]["text"][0] or "images to train on" in server.run(graph)["2"]["text"][0]
        )
