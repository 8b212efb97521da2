"""Run by core_latents.py on ComfyUI's Python, in its folder: the latents of ComfyUI's own nodes, in fp32.

Argument: a JSON file with `checkpoint`, `lora`, `strengths`, `prompts`, `seed`, `steps`, `guidance`, `sampler`,
`scheduler`, `size`, and `out`, the file for the latents.
"""

import json
import sys
from pathlib import Path

request = json.loads(Path(sys.argv[1]).read_text())
sys.path.insert(0, str(Path.cwd()))
sys.argv[1:] = ["--cpu", "--force-fp32", "--fp32-unet", "--fp32-text-enc"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import folder_paths  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402

import nodes  # noqa: E402


def name_of(kind: str, file: str) -> str:
    """As ComfyUI's loaders know the file: relative to a folder of its kind."""
    folder_paths.add_model_folder_path(kind, str(Path(file).parent))
    return Path(file).name


with torch.inference_mode():
    model, clip, _ = nodes.CheckpointLoaderSimple().load_checkpoint(name_of("checkpoints", request["checkpoint"]))
    model, clip = nodes.LoraLoader().load_lora(model, clip, name_of("loras", request["lora"]), *request["strengths"])
    wanted, unwanted = (nodes.CLIPTextEncode().encode(clip, prompt)[0] for prompt in request["prompts"])
    [empty] = nodes.EmptyLatentImage().generate(request["size"], request["size"])
    [result] = nodes.KSampler().sample(
        model,
        request["seed"],
        request["steps"],
        request["guidance"],
        request["sampler"],
        request["scheduler"],
        wanted,
        unwanted,
        empty,
    )
dtypes = {str(parameter.dtype) for part in (model.model, clip.cond_stage_model) for parameter in part.parameters()}
assert dtypes == {"torch.float32"}, dtypes
safetensors.torch.save_file({"latents": result["samples"].contiguous()}, request["out"])
