"""The same image by ComfyUI's own nodes and by ours, both in fp32: how far apart the final latents are.

    python -m benchmarks.core_latents --work DIR      (random weights, 7 GB in DIR, and a checkpoint of as much of them)

Load Checkpoint, Load LoRA, CLIP Text Encode and KSampler against our generation, with a LoRA on attention and on both
text encoders that this pack has written. Each side runs in a process of its own, ours first, then ComfyUI's (found
through COMFYUI_PATH, default ~/ComfyUI, on COMFYUI_PYTHON or the environment in its folder). Needs 20 GB of memory.

Prints a row: the distance relative to the latents, and, so that one knows what it means, that of the LoRA's effect.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.full_size import write_random_base
from sdxl_lora_core.cache.folders import CacheFolders
from sdxl_lora_core.generation.config import GenerateConfig
from sdxl_lora_core.generation.generate import generate
from sdxl_lora_core.generation.job import GenerationContext, GenerationJob
from sdxl_lora_core.lora.config import SaveBaseConfig
from sdxl_lora_core.lora.files import write_lora
from sdxl_lora_core.lora.merged_base import save_merged_base
from sdxl_lora_core.lora.modules import LoRAFile, LoRAModule
from sdxl_lora_core.lora.stack import LoRARef
from sdxl_lora_core.runtime.loaded_parts import LoadedParts
from sdxl_lora_core.sdxl.base import CONFIGS, open_base
from sdxl_lora_core.sdxl.family import ENCODERS, Part

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ("a lighthouse on a cliff at dusk, oil painting", "blurry")
STRENGTHS = (0.8, 0.6)
RANK = 8
TARGET = 1e-3
TRAINED: dict[Part, tuple[str, ...]] = {
    "unet": ("to_q", "to_k", "to_v", "to_out.0"),
    "text_encoder": ("q_proj", "v_proj", "fc1"),
    "text_encoder_2": ("q_proj", "v_proj", "fc1"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=7.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sampler", default="dpmpp_2m")
    parser.add_argument("--scheduler", default="karras")
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)  # in the process of our side: its request
    args = parser.parse_args()
    args.work = args.work.absolute()
    if args.ours:
        sample(json.loads(args.ours.read_text()), args.work)
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    request = {
        "checkpoint": str(checkpoint(args.work)),
        "lora": str(random_lora(args.work / "core-latents.safetensors")),
        "strengths": STRENGTHS,
        "prompts": PROMPTS,
        "seed": args.seed,
        "steps": args.steps,
        "guidance": args.guidance,
        "sampler": args.sampler,
        "scheduler": args.scheduler,
        "size": args.size,
    }
    again = [sys.executable, "-m", "benchmarks.core_latents", "--work", str(args.work), "--ours"]
    ours = run({**request, "out": str(args.work / "ours.safetensors")}, again, ROOT)
    comfyui = Path(os.environ.get("COMFYUI_PATH", "~/ComfyUI")).expanduser()
    script = [comfyui_python(comfyui), str(Path(__file__).with_name("core_sampler.py"))]
    core = run({**request, "out": str(args.work / "core.safetensors")}, script, comfyui)
    distance = apart(ours["latents"], core["latents"])
    print(
        f"| {args.sampler} {args.scheduler}, {args.steps} steps, {args.size} x {args.size}, fp32: our latents against "
        f"ComfyUI (mean {float(core['latents'].mean()):.2f}, sd {float(core['latents'].std()):.2f}) | {distance:.1e}; "
        f"the LoRA moves them by {apart(ours['without'], core['latents']):.2f} | {TARGET:g} |"
    )
    sys.exit(distance > TARGET)


def run(request: dict[str, Any], command: list[str], folder: Path) -> dict[str, Tensor]:
    """What one side's process writes for a request."""
    out = Path(request["out"])
    file = out.with_suffix(".json")
    file.write_text(json.dumps(request))
    out.unlink(missing_ok=True)
    started = time.monotonic()
    subprocess.run([*command, str(file)], cwd=folder, check=True)
    print(f"{out.stem}: {time.monotonic() - started:.0f} s", flush=True)
    return load_file(out)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


def sample(request: dict[str, Any], work: Path) -> None:
    """Our side, with the LoRA and without."""
    cache = CacheFolders(work)
    base = open_base(Path(request["checkpoint"]), "fp32", cache.hashes)
    prompt, negative = request["prompts"]
    config = GenerateConfig(
        prompt=prompt,
        negative_prompt=negative,
        width=request["size"],
        height=request["size"],
        keep_latents=True,
        cache="off",
        **{name: request[name] for name in ("seed", "steps", "guidance", "sampler", "scheduler")},
    )
    context = GenerationContext(LoadedParts(torch.device("cpu"), offload=True), cache)
    lora = LoRARef(Path(request["lora"]), "lora", *request["strengths"])
    latents = {}
    for name, stack in (("without", []), ("latents", [lora])):
        [image] = generate(GenerationJob(base, config, stack), context)
        assert image.latents is not None
        latents[name] = image.latents[None].contiguous()
    save_file(latents, request["out"])


def checkpoint(work: Path) -> Path:
    """The random base as one file, as ComfyUI reads it."""
    file = work / "random-sdxl.safetensors"
    if not file.exists():
        if not (work / "random-sdxl/model_index.json").exists():
            write_random_base(work / "random-sdxl")
        config = SaveBaseConfig(base_name=file.stem, layout="single_file", precision="bf16")
        save_merged_base(open_base(work / "random-sdxl", "bf16", work / "hashes"), (), config, work, lambda name: False)
    return file


def random_lora(file: Path) -> Path:
    draws = torch.Generator().manual_seed(0)

    def module(layer: Any) -> LoRAModule:
        down = torch.randn(RANK, layer.in_features, generator=draws) * 0.05
        return LoRAModule(down, torch.randn(layer.out_features, RANK, generator=draws) * 0.05, float(RANK))

    if not file.exists():
        lora = LoRAFile()
        for part, model in empty_parts().items():
            for name, layer in model.named_modules():
                if name.endswith(TRAINED[part]):
                    path = name if part == "unet" else f"text_model.{name.removeprefix('text_model.')}"
                    lora.parts()[part][path] = module(layer)
        write_lora(file, lora, torch.float16)
    return file


def empty_parts() -> dict[Part, nn.Module]:
    """What the LoRA changes, without weights."""
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    first, second = (CLIPTextConfig.from_pretrained(CONFIGS, subfolder=part) for part in ENCODERS)
    with init_empty_weights():
        return {
            "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(str(CONFIGS), subfolder="unet")),
            "text_encoder": CLIPTextModel(first),
            "text_encoder_2": CLIPTextModelWithProjection(second),
        }


def comfyui_python(comfyui: Path) -> str:
    own = (comfyui / name / "bin/python" for name in ("venv", ".venv"))
    found = next((str(python) for python in own if python.exists()), sys.executable)
    return os.environ.get("COMFYUI_PYTHON", found)


if __name__ == "__main__":
    main()
