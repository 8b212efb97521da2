"""Every sampler with every schedule that it has, against diffusers' own pipeline and scheduler."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdxl_lora_core.generation import samplers
from sdxl_lora_core.generation.samplers import SOLVERS, Sampler, Schedule
from sdxl_lora_core.generation.schedulers import make_scheduler, normal_sigmas
from sdxl_lora_core.runtime.loaded_parts import LoadedParts
from sdxl_lora_core.sdxl.base import SDXLBase, open_base
from tests.generation.plain_diffusers import reference
from tests.micro.images import CPU, WatchedParts, draw, edit_json, pixels, settings

PAIRS = [(sampler, schedule) for sampler, solver in SOLVERS.items() for schedule in solver.schedules]
STOCHASTIC: tuple[Sampler, ...] = ("dpmpp_2m_sde", "dpmpp_sde", "euler_ancestral", "ddpm", "lcm", "tcd")
COMFYUI_NORMAL_5 = [14.61464, 4.086081, 1.61558, 0.6951495, 0.02916716]  # its normal_scheduler for SDXL, 5 steps


@pytest.mark.slow
@pytest.mark.parametrize("steps", [8, pytest.param(20, marks=pytest.mark.accept)])
@pytest.mark.parametrize(("sampler", "schedule"), PAIRS)
def test_image_equals_diffusers_own_pipeline(
    micro_sdxl: Path, micro_base: SDXLBase, sampler: Sampler, schedule: Schedule, steps: int
) -> None:
    config = settings(steps=steps, sampler=sampler, scheduler=schedule)
    expected = reference(micro_sdxl, config)
    assert expected.std() > 10
    assert abs(pixels(micro_base, config)[0] - expected).max() <= 1


@pytest.mark.parametrize(("sampler", "schedule"), PAIRS)
def test_one_step_starts_from_pure_noise_and_progress_counts_every_call(
    micro_base: SDXLBase, sampler: Sampler, schedule: Schedule
) -> None:
    for steps in (1, 3):
        config = settings(steps=steps, sampler=sampler, scheduler=schedule)
        scheduler = make_scheduler(micro_base, config, [5])
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps[0] >= (998 if schedule != "ddim_uniform" else 600 if steps > 1 else 1)
        assert len(scheduler.timesteps) == SOLVERS[sampler].unet_calls(steps)


@pytest.mark.slow
def test_progress_of_a_sampler_with_two_calls_a_step(micro_base: SDXLBase) -> None:
    calls = []
    draw(micro_base, settings(sampler="heun", count=2), on_step=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 10) for done in range(11)]


def test_normal_is_comfyuis() -> None:
    alphas_cumprod = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    np.testing.assert_allclose(normal_sigmas(alphas_cumprod, 5), COMFYUI_NORMAL_5, rtol=1e-5)


# Samplers that draw noise


@pytest.mark.slow
@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_noise_is_the_images_own(micro_base: SDXLBase, sampler: Sampler) -> None:
    config = settings(sampler=sampler, scheduler="sgm_uniform", steps=4)
    torch.manual_seed(1)
    alone = pixels(micro_base, config)[0]
    state = torch.get_rng_state()
    with_mates = pixels(micro_base, dataclasses.replace(config, count=2, seed=4))[1]
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(alone, with_mates)
    batch = pixels(micro_base, dataclasses.replace(config, count=3, seed=4, batch_size=3))[1]
    assert abs(alone - batch).max() <= 1
    assert abs(alone - pixels(micro_base, dataclasses.replace(config, sampler="euler"))[0]).max() > 1


def test_largest_seed_has_a_brownian_path_too(micro_base: SDXLBase) -> None:
    config = settings(sampler="dpmpp_sde", seed=2**64 - 1)
    np.testing.assert_array_equal(pixels(micro_base, config), pixels(micro_base, config))


# Other bases


@pytest.fixture
def zero_snr(micro_copy: Callable[[], Path]) -> Path:
    folder = micro_copy()
    edit_json(
        folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [
        ("dpmpp_2m", "karras"),
        ("unipc", "sgm_uniform"),
        ("euler", "sgm_uniform"),
        ("euler_ancestral", "karras"),
        ("ddim", "sgm_uniform"),
        ("ddpm", "sgm_uniform"),
    ],
)
def test_zero_snr_base_is_right_by_itself(zero_snr: Path, sampler: Sampler, schedule: Schedule) -> None:
    """Rescaled betas, a start at the last step and the rescale of Lin et al., without a setting."""
    config = settings(steps=8, sampler=sampler, scheduler=schedule, guidance=30.0)
    base = open_base(zero_snr, "fp32")
    expected = reference(zero_snr, config, rescale=0.7)
    assert expected.std() > 10
    assert abs(pixels(base, config)[0] - expected).max() <= 1
    assert abs(pixels(base, dataclasses.replace(config, guidance_rescale=0.0))[0] - expected).max() > 1


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_sde"])
def test_samplers_without_the_option_start_from_zero_snr_too(zero_snr: Path, sampler: Sampler) -> None:
    base = open_base(zero_snr, "fp32")
    config = settings(sampler=sampler, scheduler="sgm_uniform")
    own, euler = (make_scheduler(base, dataclasses.replace(config, sampler=name), [0]) for name in (sampler, "euler"))
    own.set_timesteps(10)
    euler.set_timesteps(10)
    torch.testing.assert_close(own.sigmas.unique(), euler.sigmas.unique())
    assert own.sigmas.max() == pytest.approx(4096, rel=1e-6)  # rounded differently by each processor
    assert own.config.prediction_type == "v_prediction"
    assert pixels(base, dataclasses.replace(config, steps=10)).std() > 10


@pytest.mark.slow
def test_v_prediction_without_zero_snr(micro_copy: Callable[[], Path]) -> None:
    folder = micro_copy()
    edit_json(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    config = settings(steps=20, sampler="heun", scheduler="sgm_uniform")
    expected = reference(folder, config)
    assert abs(pixels(open_base(folder, "fp32"), config)[0] - expected).max() <= 1


@pytest.mark.parametrize(
    ("sampler", "schedule", "message"),
    [("pndm", "sgm_uniform", "sampler is 'pndm'"), ("ddim", "ddim_uniform", "scheduler is 'ddim_uniform'")],
)
def test_what_cannot_start_from_zero_snr_is_refused(
    micro_base: SDXLBase, sampler: Sampler, schedule: Schedule, message: str
) -> None:
    parts = WatchedParts()
    base = dataclasses.replace(micro_base, zero_terminal_snr=True)
    with pytest.raises(ValueError, match=message):
        draw(base, settings(sampler=sampler, scheduler=schedule), parts=parts)
    assert not parts.events


@pytest.mark.slow
def test_a_base_saved_with_another_schedule_takes_the_one_that_is_asked_for(
    micro_copy: Callable[[], Path], micro_base: SDXLBase
) -> None:
    folder = micro_copy()
    edit_json(folder / "scheduler" / "scheduler_config.json", use_exponential_sigmas=True, timestep_spacing="trailing")
    for schedule in ("karras", "sgm_uniform", "normal"):
        config = settings(sampler="euler", scheduler=schedule)
        np.testing.assert_array_equal(pixels(open_base(folder, "fp32"), config), pixels(micro_base, config))


# Libraries


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "dpmpp_sde"}, "sampler is 'dpmpp_sde'.*python -m pip install torchsde, or choose another sampler"),
        ({"scheduler": "beta"}, "scheduler is 'beta'.*python -m pip install scipy, or choose another scheduler"),
    ],
)
def test_a_library_that_is_not_there_is_named_with_its_command(
    micro_base: SDXLBase, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(samplers.importlib.util, "find_spec", lambda name: None)
    parts = WatchedParts()
    with pytest.raises(ValueError, match=message):
        draw(micro_base, settings(**changes), parts=parts)
    assert not parts.events


def test_an_image_in_the_cache_needs_no_library(
    micro_base: SDXLBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(scheduler="beta")
    made = draw(micro_base, config, cache_folder=tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = draw(micro_base, config, cache_folder=tmp_path)
    assert found[0].hit and found[0].key == made[0].key


# Half precision

HALF = LoadedParts(CPU)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SOLVERS)
def test_samplers_run_in_bf16(micro_base: SDXLBase, sampler: Sampler) -> None:
    base = dataclasses.replace(micro_base, precision="bf16")
    config = settings(sampler=sampler, scheduler="sgm_uniform")
    difference = pixels(base, config, parts=HALF) - pixels(micro_base, config)
    assert abs(difference).mean() < 12


# The help page


def test_help_page_says_what_goes_together() -> None:
    page = (Path(__file__).parents[2] / "web/docs/SDXLGenerateCached.md").read_text(encoding="utf-8")
    listed = page.split("## Samplers")[1].split("Which to choose:")[0].replace("\n  ", " ")
    rows = [line.split(" with ") for line in listed.splitlines() if line.startswith("- ")]
    named = [[re.findall(r"`(\w+)`", cell) for cell in row] for row in rows]
    said = {sampler: set(schedules) for names, schedules in named for sampler in names}
    assert said == {sampler: set(solver.schedules) for sampler, solver in SOLVERS.items()}
