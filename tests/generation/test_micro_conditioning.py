"""SDXL's micro-conditioning: what a request asks for reaches the UNet, pixel for pixel as diffusers' own pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline

from sdxl_lora_core.generation.config import GenerateConfig, micro_conditioning
from sdxl_lora_core.sdxl.base import SDXLBase
from tests.micro.images import WatchedParts, pixels, settings

OPTIONS: dict[str, int] = {
    "original_width": 300,
    "original_height": 200,
    "crop_left": 24,
    "crop_top": 8,
    "target_width": 128,
    "target_height": 96,
}


def test_a_size_of_zero_is_the_images_own() -> None:
    config = GenerateConfig(prompt="", width=640, height=512)
    assert micro_conditioning(config) == ((512, 640), (0, 0), (512, 640))
    config = GenerateConfig(prompt="", width=640, height=512, **OPTIONS)
    assert micro_conditioning(config) == ((200, 300), (8, 24), (96, 128))


@pytest.mark.parametrize("changes", [{}, OPTIONS, {"crop_left": 24}], ids=["own", "all", "crop"])
def test_images_equal_the_librarys_own(micro_base: SDXLBase, changes: dict[str, Any]) -> None:
    config = settings(width=80, height=64, negative_prompt="blue", **changes)
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        micro_base.path, local_files_only=True, add_watermarker=False, force_zeros_for_empty_prompt=False
    )
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, use_karras_sigmas=True)
    pipeline.set_progress_bar_config(disable=True)
    named: dict[str, Any] = {}
    if changes:
        told = micro_conditioning(config)
        named = {"original_size": told[0], "crops_coords_top_left": told[1], "target_size": told[2]}
    image = pipeline(
        prompt=config.prompt,
        negative_prompt=config.negative_prompt,
        guidance_scale=config.guidance,
        num_inference_steps=config.steps,
        width=config.width,
        height=config.height,
        generator=torch.Generator().manual_seed(config.seed),
        output_type="np",
        **named,
    ).images[0]
    wanted = (image * 255).round().astype(int)
    assert np.abs(pixels(micro_base, config)[0] - wanted).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_the_unet_is_told(micro_base: SDXLBase, option: str) -> None:
    parts, told = WatchedParts(), []
    pixels(micro_base, settings(steps=1), parts=parts)
    unet = parts.held("unet")
    see = lambda module, args, named: told.append(named["added_cond_kwargs"]["time_ids"].tolist())  # noqa: E731
    unet.register_forward_pre_hook(see, with_kwargs=True)
    pixels(micro_base, settings(steps=1, **{option: 32}), parts=parts)
    order = ("original_height", "original_width", "crop_top", "crop_left", "target_height", "target_width")
    wanted = [64, 64, 0, 0, 64, 64]
    wanted[order.index(option)] = 32
    assert told == [[wanted] * 2]


def test_an_impossible_size_is_refused() -> None:
    with pytest.raises(ValueError, match="crop_left is -1: give a value from 0 to 8192"):
        GenerateConfig(prompt="", crop_left=-1)
