"""A random SDXL of a few channels, for tests that need a model and no meaning."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sdxl_lora_core
from sdxl_lora_core.base_model import SDXLBase, open_base

DATA = Path(sdxl_lora_core.__file__).parent / "data"

# SDXL in every respect but size. No two widths that a mistake could swap are equal.
MICRO_UNET: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (8, 16, 16),
    "norm_num_groups": 4,
    "attention_head_dim": (1, 2, 2),
    "transformer_layers_per_block": (1, 1, 2),
    "cross_attention_dim": 20,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16 + 6 * 8,
}
MICRO_VAE: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (8, 8, 16, 16),
    "norm_num_groups": 4,
}
MICRO_TEXT: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "projection_dim": 8,
}
MICRO_TEXT_2: dict[str, Any] = {
    "hidden_size": 12,
    "intermediate_size": 48,
    "num_attention_heads": 3,
    "num_hidden_layers": 4,
    "projection_dim": 16,
}


def micro_config(config_class: Any, part: str, sizes: dict[str, Any]) -> dict[str, Any]:
    return {**config_class.load_config(str(DATA), subfolder=part, local_files_only=True), **sizes}


def write_micro_sdxl(folder: Path) -> None:
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    text = CLIPTextConfig.from_pretrained(DATA, subfolder="text_encoder", **MICRO_TEXT)
    text_2 = CLIPTextConfig.from_pretrained(DATA, subfolder="text_encoder_2", **MICRO_TEXT_2)
    StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_config(micro_config(AutoencoderKL, "vae", MICRO_VAE)),
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text_2),
        tokenizer=CLIPTokenizer.from_pretrained(DATA / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(DATA / "tokenizer_2"),
        unet=UNet2DConditionModel.from_config(micro_config(UNet2DConditionModel, "unet", MICRO_UNET)),
        scheduler=EulerDiscreteScheduler.from_pretrained(DATA, subfolder="scheduler"),
        add_watermarker=False,
    ).save_pretrained(folder)
    for tokenizer in ("tokenizer", "tokenizer_2"):  # as published, instead of transformers' one-file form of 4 MB each
        shutil.rmtree(folder / tokenizer)
        shutil.copytree(DATA / tokenizer, folder / tokenizer)


@pytest.fixture(scope="session")
def micro_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of 8 MB, nearly all of it CLIP's vocabulary. Read only: copy it before changing it."""
    folder = tmp_path_factory.mktemp("micro") / "micro-sdxl"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        write_micro_sdxl(folder)
    return folder


@pytest.fixture(scope="session")
def micro_base(micro_sdxl: Path) -> SDXLBase:
    return open_base(micro_sdxl, precision="fp32")


@pytest.fixture
def micro_copy(micro_sdxl: Path, tmp_path: Path) -> Callable[[], Path]:
    """Makes copies of the micro model that a test may break."""

    def copy() -> Path:
        folder = tmp_path / f"copy-{len(list(tmp_path.glob('copy-*')))}"
        shutil.copytree(micro_sdxl, folder)
        return folder

    return copy
