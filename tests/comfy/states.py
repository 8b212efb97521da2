"""Run by test_states.py on ComfyUI's Python, in its folder: what each node leaves behind, however it ends.

Argument: a base directory of ComfyUI that holds this pack, small_core, the ControlNet edges.safetensors and the
dataset input/two. Prints for each node and each way to end how it ended, what of the process's state has changed,
whether ComfyUI's own model is still loaded, and which of our parts still count as being in use.
"""

import asyncio
import inspect
import json
import os
import random
import sys
import threading
from pathlib import Path

[home] = sys.argv[1:]
sys.path.insert(0, str(Path.cwd()))
sys.argv[1:] = ["--cpu", "--base-directory", home]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.model_management as management  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import utils.extra_config  # noqa: E402, F401 - as main.py does: from nodes on, `utils` would be another

import nodes  # noqa: E402

PACK = str(Path(home) / "custom_nodes/sdxl-lora-nodes")
DEPTHS = (0.2, 0.5, 0.8)  # of a node's work, counted in calls of the pack's functions
BUNDLED = "8bit_style (bundled)"
CLIP = "tiny-clip (bundled)"
LORA = {"strength_model": 1.0, "strength_clip": 1.0, "enabled": True}
TRAIN = {"learning_rate": 1e-3, "rank": 2, "alpha": 2.0, "batch_size": 1, "seed": 0, "sample_prompts": "a star"}
WATCHED = {"validate_every": 1, "sample_every": 1, "sample_steps": 1, "deterministic": True}
IMAGE = {
    "steps": 2,
    "guidance": 5.0,
    "width": 64,
    "height": 64,
    "count": 1,
    "sampler": "dpmpp_sde",
    "scheduler": "karras",
}


class Broken(RuntimeError):
    """What a node meets in the middle of its work."""


class Depth:
    """Counts the calls of the pack's functions in this thread; at the call number `at` it calls `then`."""

    def __init__(self, at=0, then=None):
        self.calls, self.at, self.then = 0, at, then

    def __call__(self, frame, event, _):
        if event == "call" and of_the_pack(frame.f_code):
            self.calls += 1
            if self.calls == self.at:
                self.then()


def of_the_pack(code):
    plain = not code.co_flags & inspect.CO_GENERATOR and not code.co_name.startswith(("<", "__"))
    return plain and code.co_filename.startswith(PACK)


def fail():
    raise Broken


def state():
    """What of the process a node may change while it runs, and has to put back."""
    kinds = ("cpu", "cuda")
    return {
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds],
        "autocast's cache": torch.is_autocast_cache_enabled(),
        "random numbers of Python": random.getstate(),
        "random numbers of numpy": repr(np.random.get_state()),
        "random numbers of torch": torch.get_rng_state().tolist(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "TF32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "cuDNN": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "default type": (torch.get_default_dtype(), torch.get_default_device()),
        "determinism": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "torch's threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "threads": {thread.name for thread in threading.enumerate()} - {"tqdm_monitor"},
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "training": getattr(management, "in_training", False),
        "dead models": [listed for listed in management.current_loaded_models if listed.model is None],
    }


def owner():
    return next(module for name, module in sys.modules.items() if name.endswith("nodes.host.memory"))._owner()


def call(node, inputs):
    node_class = nodes.NODE_CLASS_MAPPINGS[node]
    given = getattr(node_class(), node_class.FUNCTION)(**inputs)
    return given["result"] if isinstance(given, dict) else given


def ending(node, inputs, depth):
    sys.setprofile(depth)
    try:
        call(node, inputs)
    except management.InterruptProcessingException:
        return "is cancelled"
    except Exception as error:
        if not of_broken(error):
            raise
        return "fails"
    finally:
        sys.setprofile(None)
        management.interrupt_current_processing(False)
    return "finishes"


def of_broken(error):
    """Whether it is a Broken, or was raised because of one."""
    while error is not None and not isinstance(error, Broken):
        error = error.__cause__
    return error is not None


def left_behind(node, inputs, depth, core):
    management.load_models_gpu([core])
    before = state()
    ended = ending(node, inputs, depth)
    after = state()
    return {
        "ended": ended,
        "changed": [name for name, value in after.items() if value != before[name]],
        "ComfyUI's model": any(listed.model is core for listed in management.current_loaded_models),
        "in use": sorted(owner().in_use),
    }


def every_way(node, inputs_of, core):
    """`inputs_of` gives the inputs of a run by its number, so that no run finds the results of another."""
    whole = Depth()
    ways = {
        "finishes for the first time": left_behind(node, inputs_of(0), Depth(), core),
        "finishes": left_behind(node, inputs_of(1), whole, core),
    }
    for number, depth in enumerate(DEPTHS):
        at = Depth(max(1, round(whole.calls * depth)), fail)
        ways[f"fails at {depth:.0%}"] = left_behind(node, inputs_of(2 + number), at, core)
    cancel = Depth(max(1, round(whole.calls * DEPTHS[0])), management.interrupt_current_processing)
    return {**ways, "is cancelled": left_behind(node, inputs_of(9), cancel, core)}


def inputs_of_nodes():
    """For each node a function from a run's number to its inputs."""
    folder = {"folder": "two", "trigger_word": "", "resolution": 64, "validation_percent": 50}
    model, _ = call("SmallCoreSDXL", {"seed": 0})
    [base, _] = call("LoadSDXLBase", {"base": "tiny-sdxl (bundled)", "precision": "fp32"})
    dataset = call("LoadCaptionDataset", folder)[0]
    stack = call("LoadLoRA", {"lora_name": BUNDLED, **LORA})[0]
    two = call("LoadLoRA", {"lora_name": "line_style (bundled)", **LORA, "lora_stack": stack})[0]
    picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    net = {"control_net": "edges.safetensors", "image": picture}
    net |= {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    controls = call("AddControlNet", net)[0]
    job = {"base": base, "dataset": dataset, "steps": 2, **TRAIN, "options": WATCHED}
    image = {"base": base, "prompt": "a star", "negative_prompt": "", "cache": "use", **IMAGE}
    image |= {"lora_stack": two, "controls": controls}
    options = {name: (lambda _: {}) for name in nodes.NODE_CLASS_MAPPINGS if name.endswith("Options")}
    two_pictures = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    compared = {"base": base, "prompt": "a star\na moon", "negative_prompt": "", "count": 1, "clip_model": CLIP}
    compared |= {**{name: IMAGE[name] for name in ("steps", "guidance", "width", "height")}, "save_as": "compared"}
    compared |= {"image_model": CLIP, "references": two_pictures}
    comparison = call("CompareLoRAs", {**compared, "seed": 5, "columns": "strength: 1", "rows": "", "lora_stack": two})[
        6
    ]
    captioned = {"folder": "captioned", "captioner": "(connected captions)", "trigger_word": "ohwx", "prefix": ""}
    captioned |= {"suffix": "", "detail": "short", "existing": "replace_all", "write_to": "text_files"}
    captioned = {name: [value] for name, value in captioned.items()} | {"captions": ["a star", "a moon"]}
    merge = {"lora_stack": two, "method": "dare", "rank": 4}
    return {
        **options,
        "LoadCaptionDataset": lambda _: folder,
        "StackReport": lambda _: {"lora_stack": two},
        "DatasetReport": lambda number: {"dataset": dataset, "save_as": f"dataset-{number}"},
        "ImageSimilarity": lambda _: {"images": picture, "image_model": CLIP, "dataset": dataset, "lora_stack": two},
        "DistributionMetrics": lambda _: {
            "images": torch.cat([picture, 1 - picture]),
            "image_model": CLIP,
            "references": two_pictures,
        },
        "FilterByScore": lambda _: {
            "images": [picture],
            "scores": [20.0],
            "keep": ["best"],
            "best": [1],
            "threshold": [0.0],
        },
        "LoadSD15Base": lambda _: {"base": "micro-sd15", "precision": "fp32"},
        "CaptionImages": lambda _: captioned,
        "HumanCompare": lambda number: {
            "comparison": comparison,
            "save_as": f"vote-{number}",
            "wait_for": 0,
        },
        "CompareVariant": lambda _: {"name": "", "settings": "steps=1", "lora_stack": stack},
        "CompareLoRAs": lambda number: {
            **compared,
            "seed": 100 * number,
            "columns": "strength: 1",
            "rows": "",
            "lora_stack": two,
        },
        "PickCheckpoint": lambda number: {
            **compared,
            "seed": 200 + number,
            "checkpoints": "last",
            "lora_stack": two,
            "novel_prompt": "a cat",
        },
        "FindStrength": lambda number: {
            **compared,
            "seed": 300 + number,
            "strengths": "0.5, 1",
            "lora_stack": two,
            "novel_prompt": "",
        },
        "DatasetImages": lambda _: {"dataset": dataset, "size": 64, "count": 2},
        "LoadSDXLBase": lambda _: {"base": "tiny-sdxl (bundled)", "precision": "fp32"},
        "LoadLoRA": lambda _: {"lora_name": BUNDLED, **LORA},
        "AddControlNet": lambda _: net,
        "TrainSDXLLoRA": lambda number: {**job, "lora_name": f"run-{number}", "seed": number},
        "SDXLGenerateCached": lambda number: {**image, "seed": 100 * number},
        "CLIPScore": lambda _: {"images": picture, "prompt": "a star", "clip_model": "tiny-clip (bundled)"},
        "SDXLImageCache": lambda _: {"action": "verify", "limit_gb": 0.0},
        "SaveSDXLLoRA": lambda _: {
            "lora_name": "saved",
            "format": "kohya",
            "precision": "fp16",
            "lora_stack": two,
            "rank": 2,
        },
        "MergeLoRAs": lambda number: {**merge, "lora_name": "merged", "seed": number},
        "SaveMergedBase": lambda _: {
            "base": base,
            "lora_stack": two,
            "base_name": "merged",
            "layout": "diffusers",
            "precision": "fp32",
        },
        "ApplyLoRAStack": lambda _: {"model": model, "lora_stack": stack},
    }


def main():
    for pack in ("sdxl-lora-nodes", "small_core"):
        path = str(Path(home) / "custom_nodes" / pack)
        assert asyncio.run(nodes.load_custom_node(path, module_parent="custom_nodes"))
    core, _ = call("SmallCoreSDXL", {"seed": 1})
    ways = {name: every_way(name, inputs_of, core) for name, inputs_of in inputs_of_nodes().items()}
    sys.stdout.write("\n" + json.dumps(ways))


with torch.inference_mode():
    main()
