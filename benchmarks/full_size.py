"""Full-size SDXL with random weights on the CPU: a few training steps, and the file read back by others.

    python -m benchmarks.full_size --work DIR      (writes a base of 7 GB into DIR once)

Prints peak memory, seconds a step, and how many keys this pack and diffusers apply.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from sdxl_lora_core.cache.folders import CacheFolders
from sdxl_lora_core.dataset.caption_dataset import load_caption_dataset
from sdxl_lora_core.dataset.config import DatasetConfig
from sdxl_lora_core.lora.files import read_lora
from sdxl_lora_core.lora.merge_into_weights import merge_into
from sdxl_lora_core.runtime.device import default_device
from sdxl_lora_core.sdxl.base import CONFIGS, load_part, open_base
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.job import RunContext, TrainingJob
from sdxl_lora_core.training.monitor.progress import StepReport
from sdxl_lora_core.training.run.runs import RunFolders
from sdxl_lora_core.training.train import train

NOVELTY = 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    folder = args.work / "random-sdxl"
    if not (folder / "model_index.json").exists():
        write_random_base(folder)
    base = open_base(folder, "bf16", args.work / "hashes")
    dataset = load_caption_dataset(
        write_pictures(args.work / "pictures", args.size), DatasetConfig(resolution=args.size)
    )
    shutil.rmtree(args.work / "runs", ignore_errors=True)
    folders = RunFolders(
        args.work / "runs/loras", args.work / "runs/runs", CacheFolders(args.work / "cache"), lambda name: False
    )
    marks: list[float] = []
    config = TrainConfig(steps=args.steps, precision="bf16")

    def on_step(report: StepReport) -> None:
        if report.phase == "training":
            marks.append(time.perf_counter())

    result = train(TrainingJob(base, dataset, config), RunContext(folders, torch.device("cpu"), on_step))
    print(f"peak memory of training: {peak_gb():.2f} GB")
    print("seconds a step:", [round(b - a, 2) for a, b in zip(marks, marks[1:], strict=False)])
    print(f"tensors in the file: {len(load_file(result.lora_path))}; losses {result.report.loss:.4f}")
    unet: Any = load_part(base, "unet", torch.bfloat16)
    merged = merge_into(unet, read_lora(result.lora_path).unet, 1.0)
    print(f"this pack: {len(merged.applied)} modules changed, {len(merged.missing)} not found")
    print("diffusers:", applied_by_diffusers(unet, result.lora_path), "modules carry the adapter")


def write_random_base(folder: Path, **unet_sizes: Any) -> None:
    """The real architecture from the pack's own configuration files, bf16, small random weights.

    `unet_sizes` are settings of the UNet that shall differ.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    shutil.copytree(CONFIGS, folder, dirs_exist_ok=True)
    (folder / "model_index.json").unlink()
    makers = {
        "unet": lambda: UNet2DConditionModel.from_config(
            {**UNet2DConditionModel.load_config(str(CONFIGS), subfolder="unet"), **unet_sizes}
        ),
        "vae": lambda: AutoencoderKL.from_config(AutoencoderKL.load_config(str(CONFIGS), subfolder="vae")),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig.from_pretrained(CONFIGS, subfolder="text_encoder")),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(
            CLIPTextConfig.from_pretrained(CONFIGS, subfolder="text_encoder_2")
        ),
    }
    for part, make in makers.items():
        with torch.device("meta"):
            module: Any = make()
        fill(module.to(torch.bfloat16).to_empty(device=default_device()))
        if part == "unet":
            let_noise_through(module)
        module.to("cpu").save_pretrained(folder / part)
    shutil.copy(CONFIGS / "model_index.json", folder)


def fill(module: nn.Module) -> Any:
    generator = torch.Generator(default_device()).manual_seed(0)
    for name, buffer in module.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.02, generator=generator)
        else:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
    return module


@torch.no_grad()
def let_noise_through(unet: Any, share: float = NOVELTY) -> None:
    """Makes the UNet predict what it gets plus `share` of what its random weights say.

    Sampling then ends in latents of about the size of real ones; otherwise all of the first noise is left in them.
    The input takes the last skip connection, once as it is and once negated: silu(x) - silu(-x) = x.
    """
    start, end, out = unet.conv_in, unet.up_blocks[-1].resnets[-1], unet.conv_out
    both, group = 2 * unet.config.in_channels, start.out_channels // unet.config.norm_num_groups
    signed = torch.cat([torch.eye(unet.config.in_channels), -torch.eye(unet.config.in_channels)])
    start.weight[:group] = 0
    start.weight[:both, :, 1, 1] = signed.to(start.weight)
    for layer in (end.conv2, end.conv_shortcut):
        layer.weight[:group] = 0  # the first group of the last norm holds nothing else
    skip = end.conv_shortcut.in_channels - start.out_channels
    end.conv_shortcut.weight[range(both), range(skip, skip + both)] = 1
    unet.conv_norm_out.weight[:group] = (both / group) ** 0.5  # its silent channels count in the norm
    out.weight.mul_(share)
    out.weight[:, :group] = 0
    out.weight[:, :both, 1, 1] = signed.T.to(out.weight)


def write_pictures(folder: Path, size: int, count: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (size, size), (240 * number // count, 120, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a plain picture, number {number}")
    return folder


def applied_by_diffusers(unet: Any, lora: Path) -> int:
    from diffusers import StableDiffusionXLPipeline

    state_dict, alphas = StableDiffusionXLPipeline.lora_state_dict(str(lora), unet_config=unet.config)[:2]
    StableDiffusionXLPipeline.load_lora_into_unet(state_dict, alphas, unet)
    return sum(1 for module in unet.modules() if "default_0" in getattr(module, "lora_A", {}))


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    main()
