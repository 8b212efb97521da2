"""Run by test_core_lora.py on ComfyUI's Python, in its folder: what core's nodes and ours do to the same weights.

Arguments: a base directory of ComfyUI that holds this pack, and a JSON file. Its `calls` are nodes to run before all
else, with their inputs. Its `cases` name two recipes each: a checkpoint, LoRAs (name, strengths, blocks) and by whose
nodes they are applied. Prints for each case how far the second recipe's weights are from the first's, by key, with how
many weights each has changed and what ComfyUI complained of.
"""

import asyncio
import functools
import json
import logging
import re
import sys
from pathlib import Path

home, file = sys.argv[1:]
sys.path.insert(0, str(Path.cwd()))
sys.argv[1:] = ["--cpu", "--base-directory", home]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.lora  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
import utils.extra_config  # noqa: E402, F401 - as main.py does: from nodes on, `utils` would be another

import nodes  # noqa: E402

PACK = "custom_nodes/sdxl-lora-nodes"
CORE_FOLDERS = ("checkpoints", "loras")  # of output/, as main.py adds them

complaints: list[str] = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: complaints.append(record.getMessage())


def call(node: str, **inputs: object) -> tuple:
    node_class = nodes.NODE_CLASS_MAPPINGS[node]
    given = getattr(node_class(), node_class.FUNCTION)(**inputs)
    return given["result"] if isinstance(given, dict) else given


def stack_of(loras: list) -> list:
    stack = None
    for name, strength_model, strength_clip, *blocks in loras:
        [stack, *_] = call(
            "LoadLoRA",
            lora_name=name,
            strength_model=strength_model,
            strength_clip=strength_clip,
            enabled=True,
            lora_stack=stack,
            blocks=blocks[0] if blocks else "",
        )
    return stack or []


@functools.cache
def checkpoint(name: str) -> tuple:
    return call("CheckpointLoaderSimple", ckpt_name=name)[:2]


def core_way(model: object, clip: object, loras: list) -> tuple:
    for name, strength_model, strength_clip in loras:
        model, clip = call(
            "LoraLoader",
            model=model,
            clip=clip,
            lora_name=name,
            strength_model=strength_model,
            strength_clip=strength_clip,
        )
    return model, clip


def our_way(model: object, clip: object, loras: list) -> tuple:
    return call("ApplyLoRAStack", model=model, lora_stack=stack_of(loras), clip=clip)[:2]


class Made:
    """What a recipe gives: every weight of MODEL and CLIP, merged in float32 as ModelPatcher does it."""

    def __init__(self, recipe: dict) -> None:
        complaints.clear()
        way = {"core": core_way, "ours": our_way}[recipe["by"]]
        model, clip = way(*checkpoint(recipe["checkpoint"]), recipe["loras"])
        self.complaints = list(complaints)
        self.checkpoint = recipe["checkpoint"]
        self.patches = {**model.patches, **clip.patcher.patches}
        self._weights = {**model.model.state_dict(), **clip.cond_stage_model.state_dict()}
        self.keys = set(self._weights)

    def plain(self, key: str) -> torch.Tensor:
        return self._weights[key].float()

    def weight(self, key: str) -> torch.Tensor:
        if key not in self.patches:
            return self.plain(key)
        return comfy.lora.calculate_weight(self.patches[key], self.plain(key).clone(), key)


def compared(first: dict, second: dict) -> dict:
    """By key: `errors` of the second and `changes` by the first recipe, relative to the weight's largest value."""
    one, other = Made(first), Made(second)
    assert one.keys == other.keys
    keys = {*one.patches, *other.patches} if one.checkpoint == other.checkpoint else one.keys
    errors, changes = {}, {}
    for key in filter(looked_at, sorted(keys)):
        wanted = one.weight(key)
        errors[key] = distance(other.weight(key), wanted)
        changes[key] = distance(one.plain(key), wanted)
    return {
        "patched": [len(one.patches), len(other.patches)],
        "complaints": [one.complaints, other.complaints],
        "errors": errors,
        "changes": changes,
    }


def looked_at(key: str) -> bool:
    """Of the text encoders, whose layers are alike, every fourth; not the projection that core makes up."""
    layer = re.search(r"encoder\.layers\.(\d+)", key)
    return key != "clip_l.transformer.text_projection.weight" and (not layer or int(layer[1]) % 4 == 0)


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs_().max() / wanted.abs().max().clamp(min=1e-30))


def main() -> None:
    for kind in CORE_FOLDERS:
        folder_paths.add_model_folder_path(kind, str(Path(folder_paths.get_output_directory()) / kind))
    assert asyncio.run(nodes.load_custom_node(str(Path(home) / PACK), module_parent="custom_nodes"))
    logging.getLogger().addHandler(handler)
    request = json.loads(Path(file).read_text())
    for node, inputs in request["calls"]:
        if "lora_stack" in inputs:
            inputs["lora_stack"] = stack_of(inputs["lora_stack"])
        if "base" in inputs:
            [inputs["base"], _] = call("LoadSDXLBase", base=inputs["base"], precision="auto")
        call(node, **inputs)
    cases = {name: compared(*recipes) for name, recipes in request["cases"].items()}
    sys.stdout.write("\n" + json.dumps(cases))


with torch.inference_mode():
    main()
