"""A random Stable Diffusion 1.5 of a few channels, as a diffusers folder and as a single file."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdxl_lora_core.sdxl.family import CONFIGS, SD15
from sdxl_lora_core.sdxl.unet_names import sai_block_name
from tests.micro.published import published_vae

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 8, 16, 16),
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
}
VAE: dict[str, Any] = {"sample_size": 64, "block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4}
TEXT: dict[str, Any] = {
    "hidden_size": 12,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "projection_dim": 12,
}


def write_micro_sd15(folder: Path, text: Mapping[str, Any] = TEXT) -> None:
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    def settings(config_class: Any, part: str, sizes: Mapping[str, Any]) -> dict[str, Any]:
        return {**config_class.load_config(str(SD15.configs), subfolder=part, local_files_only=True), **sizes}

    unet = {**UNET, "cross_attention_dim": text["hidden_size"]}
    StableDiffusionPipeline(
        vae=AutoencoderKL.from_config(settings(AutoencoderKL, "vae", VAE)),
        text_encoder=CLIPTextModel(CLIPTextConfig.from_pretrained(SD15.configs, subfolder="text_encoder", **text)),
        tokenizer=CLIPTokenizer.from_pretrained(CONFIGS / "tokenizer"),
        unet=UNet2DConditionModel.from_config(settings(UNet2DConditionModel, "unet", unet)),
        scheduler=PNDMScheduler.from_pretrained(SD15.configs, subfolder="scheduler"),
        safety_checker=None,
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    ).save_pretrained(folder)
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(CONFIGS / "tokenizer", folder / "tokenizer")


def as_single_file(folder: Path, file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes the tensors of a folder under the names of published checkpoints, with an unused part beside them."""
    tensors = {
        **_published_unet(load_file(folder / "unet/diffusion_pytorch_model.safetensors")),
        **published_vae(load_file(folder / "vae/diffusion_pytorch_model.safetensors")),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "model_ema.decay": torch.ones(1),
    }
    for name, value in load_file(folder / "text_encoder/model.safetensors").items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    save_file({name: value.contiguous() for name, value in tensors.items()}, file, dict(metadata or {}))


def _published_unet(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    published = {}
    for name, value in tensors.items():
        path, _, leaf = name.rpartition(".")
        sai = re.sub(r"^output_blocks\.2\.2\.", "output_blocks.2.1.", sai_block_name(path))  # no attention before it
        published[f"model.diffusion_model.{sai}.{leaf}"] = value
    return published
