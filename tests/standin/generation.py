"""Generation, scoring and merging on the stand-in accelerator: equal to the CPU's, and all memory is given back.

Collected by name only, in a process with `-p tests.standin.plugin`: see test_standin.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdxl_lora_core.control.config import CONTROL_TYPES
from sdxl_lora_core.evaluation.clip_score import score_images
from sdxl_lora_core.generation.config import GenerateConfig
from sdxl_lora_core.generation.init_images import start_images
from sdxl_lora_core.generation.samplers import SAMPLERS, SOLVERS, Sampler
from sdxl_lora_core.lora.stack import LoRARef
from sdxl_lora_core.runtime.loaded_parts import LoadedParts
from sdxl_lora_core.sdxl.base import SDXLBase, open_base
from tests.generation.test_init_images import half_mask, picture
from tests.micro.controls import control, random_net, save_single
from tests.micro.images import held, pixels, settings, weighted, write_lora
from tests.standin.accelerator import ACCEL, NAME

DEVICE = torch.device(NAME, 0)
ROOT = Path(__file__).resolve().parents[2]
EACH_SAMPLER = [
    pytest.param(name, marks=[] if name in ("dpmpp_2m", "ddim") else pytest.mark.accept) for name in SAMPLERS
]


@pytest.fixture
def device() -> Iterator[LoadedParts]:
    """An owner of parts on the device, which frees them."""
    allocated = ACCEL.allocated
    parts = LoadedParts(DEVICE)
    yield parts
    parts.drop_all()
    assert ACCEL.allocated == allocated


def require_equal(base: SDXLBase, config: GenerateConfig, device: LoadedParts, *loras: LoRARef, **options: Any) -> None:
    wanted = pixels(base, config, loras, **options)
    assert wanted.std() > 5
    np.testing.assert_array_equal(pixels(base, config, loras, parts=device, **options), wanted)
    assert all(weight.device.type == NAME for weight in held(device, "unet").parameters())


@pytest.fixture(scope="module")
def loras(micro_base: SDXLBase, tmp_path_factory: pytest.TempPathFactory) -> list[LoRARef]:
    folder = tmp_path_factory.mktemp("loras")
    return [write_lora(folder / f"{seed}.safetensors", micro_base, seed) for seed in (1, 2)]


@pytest.mark.parametrize("sampler", EACH_SAMPLER)
def test_each_sampler(micro_base: SDXLBase, device: LoadedParts, sampler: Sampler) -> None:
    config = settings(sampler=sampler, scheduler=SOLVERS[sampler].schedules[0], count=2, batch_size=2)
    require_equal(micro_base, config, device)


@pytest.mark.accept
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_each_precision(micro_sdxl: Path, device: LoadedParts, loras: list[LoRARef], precision: Any) -> None:
    require_equal(open_base(micro_sdxl, precision), settings(), device, *loras)


OPTIONS: dict[str, dict[str, Any]] = {
    "guidance interval": {"guidance_start": 0.2, "guidance_end": 0.8},
    "rescale": {"guidance_rescale": 0.5},
    "no guidance": {"guidance": 1.0},
    "second pass": {"hires_scale": 1.5, "hires_steps": 2},
    "slices": {"attention_slicing": True, "vae_slicing": True},
    "math": {"attention": "math"},
    "tiles": {"vae_tiling": True},
    "weights and long prompts": {"prompt": "a (red:1.3) circle " * 30, "prompt_syntax": "comfy"},
    "off the device after each phase": {"offload": "phase"},
}


@pytest.mark.accept
@pytest.mark.parametrize("option", OPTIONS)
def test_each_option(micro_base: SDXLBase, device: LoadedParts, option: str) -> None:
    config = settings(**OPTIONS[option])
    np.testing.assert_array_equal(pixels(micro_base, config, parts=device), pixels(micro_base, config))
    if config.offload == "phase":
        assert not ACCEL.allocated


@pytest.mark.accept
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral", "lcm"])
@pytest.mark.parametrize("masked", [False, True], ids=["image to image", "inpainting"])
def test_it_starts_from_an_image(micro_base: SDXLBase, device: LoadedParts, masked: bool, sampler: Sampler) -> None:
    config = settings(denoise=0.5, sampler=sampler, scheduler="sgm_uniform")
    starts = start_images(config, [picture()], masks=[half_mask()] if masked else ())
    require_equal(micro_base, config, device, starts=starts)


@pytest.fixture(scope="module")
def net(micro_base: SDXLBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_single(tmp_path_factory.mktemp("controlnet") / "net.safetensors", random_net(micro_base, 1))


@pytest.mark.accept
def test_a_control_net(micro_base: SDXLBase, device: LoadedParts, net: Path) -> None:
    require_equal(micro_base, settings(), device, controls=[control(net, end_percent=0.7)])


@pytest.mark.accept
def test_a_control_net_union(micro_base: SDXLBase, device: LoadedParts, tmp_path: Path) -> None:
    union = save_single(tmp_path / "union.safetensors", random_net(micro_base, 1, union=True))
    require_equal(micro_base, settings(), device, controls=[control(union, control_type=CONTROL_TYPES[4])])


def test_a_stack_is_changed_in_place(micro_base: SDXLBase, device: LoadedParts, loras: list[LoRARef]) -> None:
    one, other = loras
    require_equal(micro_base, settings(), device, one)
    unet, allocated = held(device, "unet"), ACCEL.allocated
    for stack in ([other], [weighted(one, 0.5, 0.5), other], [], [one]):
        require_equal(micro_base, settings(), device, *stack)
        assert held(device, "unet") is unet
        assert ACCEL.allocated == allocated


@pytest.mark.parametrize("sampler", EACH_SAMPLER)
def test_a_step_does_not_wait_for_the_device(
    micro_base: SDXLBase, device: LoadedParts, sampler: Sampler, net: Path
) -> None:
    seen: list[int] = []
    schedule = SOLVERS[sampler].schedules[0]
    config = settings(sampler=sampler, scheduler=schedule, steps=6, guidance_start=0.1, guidance_end=0.9)
    controls = [control(net, end_percent=0.7)]
    pixels(micro_base, config, parts=device, controls=controls, on_step=lambda *_: seen.append(ACCEL.waits.total()))
    steps = [after - before for before, after in zip(seen[1:], seen[2:], strict=False)]
    assert steps == [int(sampler == "unipc" and number > 0) for number in range(len(steps))]  # which solves a system


def test_scores() -> None:
    images = list(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8))
    on_cpu, on_device = (
        score_images(images, ["a red circle"], ROOT / "assets" / "tiny-clip", where) for where in ("cpu", DEVICE)
    )
    assert on_device == on_cpu


SMALL_DEVICES = {  # the size beside which it is too small, in bytes, and what is said
    "part": (settings(), 700_000, "moving the unet .0.0 GB. to the accel: set the base's precision to bf16 or fp16"),
    "UNet": (settings(), 840_000, "the UNet computes 64x64, batch_size 1: lower batch_size, width or height"),
    "VAE": (settings(width=256), 2_000_000, "the VAE decodes 256x64, batch_size 1: set vae_tiling or vae_slicing"),
}


@pytest.mark.parametrize("name", SMALL_DEVICES)
def test_a_device_that_is_too_small(micro_base: SDXLBase, device: LoadedParts, name: str, tmp_path: Path) -> None:
    config, size, words = SMALL_DEVICES[name]
    config = replace(config, offload="phase")
    wanted = pixels(micro_base, config, prompt_cache=tmp_path)
    pixels(micro_base, config, parts=device, prompt_cache=tmp_path)
    said = f"^out of memory while {words}.*accel out of memory"
    with ACCEL.limited(size), pytest.raises(torch.OutOfMemoryError, match=said):
        pixels(micro_base, config, parts=device, prompt_cache=tmp_path)
    again = pixels(micro_base, config, parts=device, prompt_cache=tmp_path)
    np.testing.assert_array_equal(again, wanted)
