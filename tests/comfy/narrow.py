"""SDXL with every layer that the real one has and few channels in its UNet: the smallest that core takes for SDXL.

python -m tests.comfy.narrow FOLDER      (5 GB; a process of its own, since what writing takes stays taken)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.full_size import write_random_base
from sdxl_lora_core.lora.config import SaveBaseConfig
from sdxl_lora_core.lora.merged_base import save_merged_base
from sdxl_lora_core.sdxl.base import CONFIGS, open_base
from tests.conftest import sdxl_config
from tests.micro.deep import TEXT_LAYERS, layer, random_factors, resnet_layers, text_layers, transformer_layers

EVERY_LAYER = 788  # 722 of the transformers, 66 of the resnets and their samplers
EVERY_ATTENTION = 8 * 70
EVERY_TEXT_LAYER = 6 * sum(TEXT_LAYERS.values())
NARROW = {"block_out_channels": (320, 640, 320), "attention_head_dim": (5, 10, 5)}  # a shortcut wherever SDXL has one
ENCODERS = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


def write_home(home: Path) -> None:
    """In models/ of a base directory: diffusers/narrow, the same as checkpoints/narrow.safetensors, and three LoRAs.

    unet.safetensors is of every layer, text.safetensors and the DoRA dora.safetensors of all attention and both text
    encoders. 5 GB.
    """
    models = home / "models"
    write_random_base(models / "diffusers/narrow", **NARROW)
    config = SaveBaseConfig(base_name="narrow", layout="single_file", precision="fp16")
    save_merged_base(open_base(models / "diffusers/narrow"), (), config, models / "checkpoints", lambda name: False)
    parts = empty_parts()
    attention = {sai: path for sai, path in transformer_layers().items() if "_attn" in sai}
    both = unet_keys(parts, attention) | text_keys(parts)
    loras = {
        "unet": kohya(unet_keys(parts, transformer_layers() | resnet_layers()), alpha=2.0),
        "text": kohya(both, alpha=1.0),
        "dora": kohya(both, alpha=1.0, dora=True),
    }
    (models / "loras").mkdir()
    for name, tensors in loras.items():
        save_file(tensors, models / f"loras/{name}.safetensors")


def empty_parts() -> dict[str, Any]:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    first, second = (CLIPTextConfig.from_pretrained(CONFIGS, subfolder=part) for part in ENCODERS)
    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel.from_config(sdxl_config(UNet2DConditionModel, "unet", NARROW)),
            "text_encoder": CLIPTextModel(first),
            "text_encoder_2": CLIPTextModelWithProjection(second),
        }


def unet_keys(parts: dict[str, Any], layers: dict[str, str]) -> dict[str, Tensor]:
    return {f"lora_unet_{sai}": layer(parts["unet"], path).weight for sai, path in layers.items()}


def text_keys(parts: dict[str, Any]) -> dict[str, Tensor]:
    return {
        prefix + path.replace(".", "_"): layer(parts[part], path).weight
        for part, prefix in ENCODERS.items()
        for path in text_layers(part)
    }


def kohya(weights: dict[str, Tensor], alpha: float, dora: bool = False) -> dict[str, Tensor]:
    """A random LoRA by kohya's keys, for weights by the stems of their keys."""
    tensors = {}
    for number, (stem, weight) in enumerate(weights.items()):
        down, up = random_factors(weight, number)
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        if dora:
            draw = torch.Generator().manual_seed(number)
            rows = (weight.shape[0], *[1] * (weight.dim() - 1))
            tensors[f"{stem}.dora_scale"] = 0.5 + torch.rand(rows, generator=draw)
    return tensors


if __name__ == "__main__":
    write_home(Path(sys.argv[1]))
