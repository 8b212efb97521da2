"""Run by test_memory.py on ComfyUI's Python, in its folder: what ComfyUI's memory management does with our parts.

Argument: a base directory of ComfyUI that holds this pack. Prints which of our parts are held and which models are on
the device after each event. The device has the memory of three parts and a half.
"""

import asyncio
import json
import sys
import weakref
from importlib.util import find_spec
from pathlib import Path

[home] = sys.argv[1:]
sys.path.insert(0, str(Path.cwd()))
sys.argv[1:] = ["--cpu", "--base-directory", home]
if find_spec("comfy_aimdo"):
    import comfy_aimdo.control

    comfy_aimdo.control.init()  # as main.py does it before ComfyUI's modules are imported
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.cli_args  # noqa: E402
import comfy.model_management as management  # noqa: E402
import comfy.model_patcher as patchers  # noqa: E402
import torch  # noqa: E402
import utils.extra_config  # noqa: E402, F401 - as main.py does: from nodes on, `utils` would be another

import nodes  # noqa: E402

PACK = "custom_nodes/sdxl-lora-nodes"
SIZE = 4000  # bytes of a part
DEVICE = torch.device("cpu:0")  # of which ComfyUI does not know that it is the CPU, whose memory it never frees
CPU = torch.device("cpu")


class Core(torch.nn.Module):
    """A model of ComfyUI's."""

    def __init__(self, parts):
        super().__init__()
        self.weights = torch.nn.Linear(parts * SIZE // 4, 1, bias=False)


def free_memory(device=None, torch_free_too=False):
    loaded = sum(listed.model.loaded_size() for listed in management.current_loaded_models)
    free = 3.5 * SIZE + management.minimum_inference_memory() - loaded
    return (free, 0) if torch_free_too else free


def request(part):
    return LOADED.PartRequest(part, "key", lambda: LOADED.Loaded(new_module(part)), offload=part != "unet")


def new_module(part):
    module = torch.nn.Linear(SIZE // 4, 1, bias=False)
    WEIGHTS[part] = weakref.ref(module.weight)
    return module


def now():
    names = {id(patcher): part for part, patcher in OWNER._patchers.items()}
    listed = [entry.model for entry in management.current_loaded_models]
    loaded = [names.get(id(model), "ComfyUI's model") for model in listed if model.loaded_size()]
    alive = [part for part, weight in WEIGHTS.items() if weight() is not None]
    return {"held": sorted(OWNER._held), "on the device": sorted(loaded), "in memory": sorted(alive)}


def use(*parts):
    """Uses parts at the same time. Returns what is on the device meanwhile."""
    if not parts:
        return now()["on the device"]
    with OWNER.phase(request(parts[0])):
        return use(*parts[1:])


def classic():
    """Our parts beside a model of ComfyUI's that it moves as a whole."""
    core = patchers.ModelPatcher(Core(3), DEVICE, CPU)
    for part in ("text_encoders", "vae", "unet"):
        use(part)
    yield "our parts were used", now()
    management.load_models_gpu([core])
    yield "ComfyUI's model was loaded", now()
    yield "two of our parts are in use", {"on the device": use("unet", "vae")}
    management.unload_all_models()
    yield "all models were unloaded", now()
    use("vae", "unet")
    yield "our parts were used again", now()
    yield "training has begun", while_training(core)
    yield from memory_of_a_training(core)


def memory_of_a_training(core):
    memory = MEMORY.ComfyMemory(DEVICE)
    management.load_models_gpu([core])
    before = now()["on the device"]
    memory.take(3.2 * SIZE + management.minimum_inference_memory())
    yield "memory for a training", {"least": memory.least, "before": before, "after": now()["on the device"]}
    reserved, management.EXTRA_RESERVED_VRAM = management.EXTRA_RESERVED_VRAM, 1000  # as by --reserve-vram
    yield "memory for a training, reserved", {"withheld": management.get_free_memory(DEVICE) - memory.free()}
    management.EXTRA_RESERVED_VRAM = reserved
    comfy.cli_args.args.lowvram = True
    yield "memory for a training, --lowvram", {"least": memory.least}
    comfy.cli_args.args.lowvram = False


def dynamic():
    """Our parts beside a model of ComfyUI's that gives back as much of the device as is asked for."""
    management.unload_all_models()
    core = OnCPU(Core(3), DEVICE, CPU)
    use("unet")
    management.load_models_gpu([core])
    yield "ComfyUI's model was loaded", now()
    use("unet")
    yield "a part of ours was used", {**now(), "listed": core in management.loaded_models()}
    management.load_models_gpu([core])
    yield "ComfyUI's model was loaded again", now()
    yield "training has begun", while_training(core)
    use("unet")
    management.unload_all_models()
    yield "all models were unloaded", now()


def while_training(core):
    """With a model of ComfyUI's and a resting part of ours before it."""
    management.load_models_gpu([core])
    use("vae")
    with MEMORY.training_mode():
        return now()


if hasattr(patchers, "ModelPatcherDynamic"):

    class OnCPU(patchers.ModelPatcherDynamic):
        """On a GPU the weights would be read into reserved addresses as they are used."""

        def __new__(cls, *arguments):
            return object.__new__(cls)  # for the CPU the class makes ModelPatchers

        def _vbar_get(self, create=False):
            return None  # these addresses need CUDA


assert asyncio.run(nodes.load_custom_node(str(Path(home) / PACK), module_parent="custom_nodes"))
LOADED, MEMORY = (
    next(module for name, module in sys.modules.items() if name.endswith(end))
    for end in ("sdxl_lora_core.runtime.loaded_parts", "nodes.host.memory")
)
WEIGHTS = {}
management.get_free_memory = free_memory
management.get_torch_device = lambda: DEVICE
management.get_all_torch_devices = lambda exclude_current=False: [DEVICE]
OWNER = MEMORY._owner()
with torch.inference_mode():
    seen = {"classic": dict(classic())}
    if hasattr(patchers, "ModelPatcherDynamic"):
        seen["dynamic"] = dict(dynamic())
sys.stdout.write("\n" + json.dumps(seen))
