from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdxl_lora_core.generation.config import GenerateConfig
from sdxl_lora_core.lora.stack import LoRARef
from sdxl_lora_core.runtime.loaded_parts import LoadedParts
from sdxl_lora_core.sdxl.base import SDXLBase, open_base
from tests.micro.images import CPU, TRAINED, WatchedParts, draw, edit_json, pixels, settings, weighted, write_lora

ASSETS = Path(__file__).resolve().parents[2] / "assets"


@pytest.fixture
def parts() -> WatchedParts:
    return WatchedParts()


@pytest.fixture(scope="session")
def lora(micro_base: SDXLBase, tmp_path_factory: pytest.TempPathFactory) -> LoRARef:
    return write_lora(tmp_path_factory.mktemp("loras") / "style.safetensors", micro_base, seed=1)


@pytest.fixture(scope="session")
def unet_lora(micro_base: SDXLBase, tmp_path_factory: pytest.TempPathFactory) -> LoRARef:
    path = tmp_path_factory.mktemp("loras") / "unet.safetensors"
    return write_lora(path, micro_base, seed=2, trained={"unet": TRAINED["unet"]})


def plain_pipeline(folder: Path, **scheduler: Any) -> Any:
    """Diffusers as its documentation uses it."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32, add_watermarker=False)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, **scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plain_image(pipeline: Any, config: GenerateConfig) -> np.ndarray:
    image = pipeline(
        config.prompt,
        negative_prompt=config.negative_prompt,
        num_inference_steps=config.steps,
        guidance_scale=config.guidance,
        width=config.width,
        height=config.height,
        generator=torch.Generator().manual_seed(config.seed),
        output_type="np",
    ).images[0]
    return image * 255


# The image itself


@pytest.mark.slow
@pytest.mark.parametrize("negative", ["", "a blue square"])
def test_image_equals_the_plain_pipeline(micro_sdxl: Path, micro_base: SDXLBase, negative: str) -> None:
    config = settings(steps=25, width=80, height=64, negative_prompt=negative)
    reference = plain_image(plain_pipeline(micro_sdxl, use_karras_sigmas=True), config)
    assert reference.std() > 10
    assert abs(pixels(micro_base, config)[0] - reference).max() <= 1


@pytest.mark.slow
def test_merged_stack_equals_the_pipeline_with_adapters(
    micro_sdxl: Path, micro_base: SDXLBase, lora: LoRARef, unet_lora: LoRARef
) -> None:
    config = settings(steps=25)
    pipeline = plain_pipeline(micro_sdxl, use_karras_sigmas=True)
    bare = plain_image(pipeline, config)
    pipeline.load_lora_weights(lora.path, adapter_name="first")
    pipeline.load_lora_weights(unet_lora.path, adapter_name="second")
    pipeline.set_adapters(
        ["first", "second"], [{"unet": 0.8, "text_encoder": 0.5, "text_encoder_2": 0.5}, {"unet": -0.6}]
    )
    reference = plain_image(pipeline, config)
    assert abs(reference - bare).max() > 10
    stack = [weighted(lora, 0.8, 0.5), weighted(unet_lora, -0.6, 1.0)]
    assert abs(pixels(micro_base, config, stack)[0] - reference).max() <= 1


@pytest.mark.slow
def test_v_prediction_base_with_zero_terminal_snr(micro_copy: Callable[[], Path], micro_base: SDXLBase) -> None:
    folder = micro_copy()
    edit_json(
        folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    config = settings(steps=25, guidance_rescale=0.0)
    pipeline = plain_pipeline(folder, use_karras_sigmas=True, timestep_spacing="trailing")
    made = pixels(open_base(folder, "fp32"), config)[0]
    assert abs(made - plain_image(pipeline, config)).max() <= 1
    assert abs(made - pixels(micro_base, config)[0]).max() > 20


@pytest.mark.slow
def test_vae_with_mean_and_spread_of_its_own(micro_copy: Callable[[], Path], micro_base: SDXLBase) -> None:
    folder = micro_copy()
    edit_json(folder / "vae" / "config.json", latents_mean=[0.5, -0.5, 1.0, 0.0], latents_std=[0.5, 2.0, 1.0, 0.3])
    config = settings()
    base = dataclasses.replace(micro_base, path=folder, configs=folder)  # open_base refuses the one model of this kind
    made = pixels(base, config, parts=LoadedParts(CPU))[0]
    assert abs(made - plain_image(plain_pipeline(folder, use_karras_sigmas=True), config)).max() <= 1
    assert abs(made - pixels(micro_base, config)[0]).max() > 5


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "a blue square"},
        {"negative_prompt": "a blue square"},
        {"seed": 6},
        {"steps": 4},
        {"guidance": 2.0},
        {"scheduler": "normal"},
    ],
    ids=str,
)
def test_every_setting_acts(micro_base: SDXLBase, changes: dict[str, Any]) -> None:
    before = pixels(micro_base, settings())
    assert abs(pixels(micro_base, settings(**changes)) - before).max() > 1


def test_width_and_height(micro_base: SDXLBase) -> None:
    assert pixels(micro_base, settings(width=96, height=72)).shape == (1, 72, 96, 3)


def test_end_of_a_long_prompt_is_not_seen_and_named(micro_base: SDXLBase, caplog: pytest.LogCaptureFixture) -> None:
    long = "red " * 75
    first = pixels(micro_base, settings(prompt=long + "circle"))
    np.testing.assert_array_equal(pixels(micro_base, settings(prompt=long + "square")), first)
    messages = [record.getMessage() for record in caplog.records if record.name == "sdxl_lora"]
    assert [message.split(": ")[1] for message in messages] == ["circle", "square"]


def test_largest_seed_wraps(micro_base: SDXLBase) -> None:
    last, first = draw(micro_base, settings(seed=2**64 - 1, count=2))
    assert (last.seed, first.seed) == (2**64 - 1, 0)
    np.testing.assert_array_equal(first.pixels, pixels(micro_base, settings(seed=0))[0])


def test_without_guidance_the_unet_runs_once_and_the_negative_prompt_has_no_say(
    micro_base: SDXLBase, parts: WatchedParts
) -> None:
    pixels(micro_base, settings(steps=1), parts=parts)
    batches = []
    parts.held("unet").register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    guided = pixels(micro_base, settings(guidance=7.0), parts=parts)
    free = pixels(micro_base, settings(guidance=1.0), parts=parts)
    assert batches == [2, 2, 2, 1, 1, 1]
    assert abs(guided - free).max() > 1
    np.testing.assert_array_equal(pixels(micro_base, settings(guidance=1.0, negative_prompt="grey"), parts=parts), free)


# Many images


@pytest.mark.slow
def test_an_image_does_not_depend_on_the_others(micro_base: SDXLBase) -> None:
    prompts = ["a red circle", "a blue square"]
    config = settings(prompt="\n".join(prompts), prompt_per_line=True, count=2)
    together = draw(micro_base, config)
    assert [(image.prompt, image.seed) for image in together] == [(text, seed) for text in prompts for seed in (5, 6)]
    for image in together:
        alone = pixels(micro_base, settings(prompt=image.prompt, seed=image.seed))[0]
        np.testing.assert_array_equal(image.pixels, alone)


@pytest.mark.slow
def test_batches_are_nearly_the_same_and_have_their_own_keys(micro_base: SDXLBase, parts: WatchedParts) -> None:
    single = draw(micro_base, settings(count=3), parts=parts)
    parts.held("unet").register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    sizes: list[int] = []
    batched = draw(micro_base, settings(count=3, batch_size=2), parts=parts)
    assert sizes == [4, 4, 4, 2, 2, 2]
    for one, other in zip(single, batched, strict=True):
        assert abs(one.pixels.astype(int) - other.pixels).max() <= 1
        assert (one.seed, one.key == other.key) == (other.seed, False)


def test_equal_requests_are_made_once(micro_base: SDXLBase) -> None:
    steps = []
    config = settings(prompt="a red circle\na red circle", prompt_per_line=True)
    images = draw(micro_base, config, on_step=lambda done, total: steps.append((done, total)))
    assert len(images) == 2 and images[0] == images[1]
    assert steps == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.slow
def test_bundled_model_with_its_lora_equals_the_plain_pipeline(tmp_path: Path) -> None:
    folder, lora = ASSETS / "tiny-sdxl", LoRARef(ASSETS / "loras/8bit_style.safetensors", "8bit_style", 1.0, 1.0)
    base = open_base(folder, "fp32", tmp_path)
    config = settings(prompt="8-bit illustration of a red ring on a sky background", steps=25, width=128, height=128)
    pipeline = plain_pipeline(folder, use_karras_sigmas=True)
    for stack in ([], [lora]):
        if stack:
            pipeline.load_lora_weights(lora.path)
        reference = plain_image(pipeline, config)
        assert abs(pixels(base, config, stack)[0] - reference).max() <= 1
