"""What importing the pack adds to a real ComfyUI. benchmarks/start_report.py measures the time."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.comfy.conftest import install_pack

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
