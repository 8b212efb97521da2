"""Guidance with rescale and an interval, against loops and pipelines of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdxl_lora_core.sdxl.base import SDXLBase, open_base
from tests.micro.images import WatchedParts, cancel_at, pixels, settings

TINY = Path(__file__).resolve().parents[2] / "assets/tiny-sdxl"  # the micro model does not care about its prompt


@pytest.fixture(scope="module")
def tiny() -> SDXLBase:
    return open_base(TINY, "fp32")


def plain_pipeline(folder: Path) -> Any:
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32, add_watermarker=False)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, use_karras_sigmas=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def by_hand(folder: Path, config: Any, interval: tuple[float, float]) -> np.ndarray:
    """The denoising loop written out, with guidance where the noise level lies in the interval."""
    pipeline = plain_pipeline(folder)
    wanted, unwanted, pooled, unwanted_pooled = pipeline.encode_prompt(
        config.prompt, negative_prompt=config.negative_prompt
    )
    sizes = torch.tensor([[config.height, config.width, 0, 0, config.height, config.width]], dtype=torch.float32)
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(config.seed))
    pipeline.scheduler.set_timesteps(config.steps)
    with torch.no_grad():
        for time in pipeline.scheduler.timesteps:
            noise = pipeline.unet(latents, time, wanted, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes})
            noise = noise.sample
            if interval[0] <= 1 - float(time) / 999 <= interval[1]:
                conditions = {"text_embeds": unwanted_pooled, "time_ids": sizes}
                free = pipeline.unet(latents, time, unwanted, added_cond_kwargs=conditions).sample
                noise = free + config.guidance * (noise - free)
            latents = pipeline.scheduler.step(noise, time, latents).prev_sample
        image = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample[0]
    return ((image / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).numpy()


@pytest.mark.slow
def test_each_setting_acts(tiny: SDXLBase) -> None:
    plain = pixels(tiny, settings(steps=6))
    for changes in ({"guidance_rescale": 0.4}, {"guidance_start": 0.3}, {"guidance_end": 0.6}):
        assert abs(pixels(tiny, settings(steps=6, **changes)) - plain).max() > 50


@pytest.mark.slow
@pytest.mark.parametrize("rescale", [0.4, 1.0])
def test_rescale_equals_diffusers(tiny: SDXLBase, rescale: float) -> None:
    config = settings(steps=10, guidance=9.0, guidance_rescale=rescale)
    reference = plain_pipeline(TINY)(
        config.prompt,
        negative_prompt="",
        num_inference_steps=10,
        guidance_scale=9.0,
        guidance_rescale=rescale,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(config.seed),
        output_type="np",
    ).images[0]
    assert abs(pixels(tiny, config)[0] - reference * 255).max() <= 1


@pytest.mark.slow
def test_a_unet_that_takes_the_scale_as_an_input_equals_diffusers(micro_copy: Callable[[], Path]) -> None:
    from diffusers import UNet2DConditionModel

    folder = micro_copy()
    config = {**UNet2DConditionModel.load_config(folder / "unet"), "time_cond_proj_dim": 12}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    base, pipeline = open_base(folder, "fp32"), plain_pipeline(folder)
    images = [pixels(base, settings(steps=3, guidance=guidance)) for guidance in (3.0, 9.0)]
    for guidance, image in zip((3.0, 9.0), images, strict=True):
        request = settings(steps=3, guidance=guidance)
        reference = pipeline(
            request.prompt,
            num_inference_steps=3,
            guidance_scale=guidance,
            width=64,
            height=64,
            generator=torch.Generator().manual_seed(request.seed),
            output_type="np",
        ).images[0]
        assert abs(image[0] - reference * 255).max() <= 1
    assert (images[0] != images[1]).any()


@pytest.mark.slow
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 1.0), (0.0, 0.6), (0.3, 0.6)])
def test_interval_equals_the_loop_written_out(tiny: SDXLBase, interval: tuple[float, float]) -> None:
    config = settings(
        steps=10, guidance=9.0, negative_prompt="a blue square", guidance_start=interval[0], guidance_end=interval[1]
    )
    assert abs(pixels(tiny, config)[0] - by_hand(TINY, config, interval)).max() <= 1


@pytest.mark.slow
def test_steps_out_of_the_interval_cost_half_and_leave_nothing_behind(micro_base: SDXLBase) -> None:
    parts = WatchedParts()
    plain = pixels(micro_base, settings(steps=10), parts=parts)
    rows: list[int] = []
    counting = parts.held("unet").conv_in.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    for count in (1, 2):
        config = settings(
            steps=10, guidance_start=0.3, guidance_end=0.6, count=count, batch_size=count, scheduler="sgm_uniform"
        )
        pixels(micro_base, config, parts=parts)
        assert rows == [n * count for n in (1, 1, 1, 2, 2, 2, 1, 1, 1, 1)]  # at 699, 599 and 499
        rows.clear()
    counting.remove()
    np.testing.assert_array_equal(pixels(micro_base, settings(steps=10), parts=parts), plain)


def test_cancelling_within_an_interval_leaves_nothing_behind(micro_base: SDXLBase) -> None:
    parts = WatchedParts()
    plain = pixels(micro_base, settings(), parts=parts)
    with pytest.raises(KeyboardInterrupt):
        pixels(micro_base, settings(guidance_end=0.1), parts=parts, on_step=cancel_at(2))
    np.testing.assert_array_equal(pixels(micro_base, settings(), parts=parts), plain)
