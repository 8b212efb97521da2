"""Run by test_memory.py on ComfyUI's Python, in its folder: what ComfyUI's memory management does with our parts.

Argument: a base directory of ComfyUI that holds this pack. Prints the parts that are held after each event. The device
has the memory of three parts.
"""

import asyncio
import json
import sys
from pathlib import Path

[home] = sys.argv[1:]
sys.path.insert(0, str(Path.cwd()))
sys.argv[1:] = ["--cpu", "--base-directory", home]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.model_management as management  # noqa: E402
import torch  # noqa: E402
import utils.extra_config  # noqa: E402, F401 - as main.py does: from nodes on, `utils` would be another

import nodes  # noqa: E402

PACK = "custom_nodes/sdxl-lora-nodes"
SIZE = 4000  # bytes of a part
CPU = torch.device("cpu")


def free_memory(device: object = None, torch_free_too: bool = False) -> object:
    loaded = sum(listed.model.loaded_size() for listed in management.current_loaded_models)
    free = 3 * SIZE - loaded
    return (free, 0) if torch_free_too else free


def request(part: str) -> object:
    module = torch.nn.Linear(SIZE // 4, 1, bias=False)
    return LOADED.PartRequest(part, "key", lambda: LOADED.Loaded(module), offload=part != "unet")


def held() -> list[str]:
    return sorted(OWNER._held)


assert asyncio.run(nodes.load_custom_node(str(Path(home) / PACK), module_parent="custom_nodes"))
LOADED, MEMORY = (
    next(module for name, module in sys.modules.items() if name.endswith(end))
    for end in ("sdxl_lora_core.runtime.loaded_parts", "nodes.host.memory")
)
OWNER = MEMORY.ComfyParts(CPU)
management.get_free_memory = free_memory
seen = {}
with torch.inference_mode():
    for part in ("text_encoders", "vae", "unet"):
        with OWNER.phase(request(part)):
            pass
    seen["resting"] = held()
    management.free_memory(free_memory() + SIZE // 2, CPU)  # for another model
    seen["another model"] = held()
    management.unload_all_models()
    seen["unloaded"] = held()
sys.stdout.write("\n" + json.dumps(seen))
