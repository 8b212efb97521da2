"""Pictures on the way: the sampler's estimate of the clean latents."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sdxl_lora_core.generation.samplers import SOLVERS, Sampler
from sdxl_lora_core.generation.schedulers import make_scheduler
from sdxl_lora_core.generation.x0_estimate import clean_estimate
from sdxl_lora_core.sdxl.base import SDXLBase
from sdxl_lora_core.sdxl.latents import scaled
from tests.micro.images import SHARED, draw, held, settings


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", SOLVERS)
def test_of_a_perfect_answer_it_is_the_clean_image(micro_base: SDXLBase, sampler: Sampler, prediction: Any) -> None:
    base = replace(micro_base, prediction_type=prediction)
    config = settings(sampler=sampler, scheduler=SOLVERS[sampler].schedules[0], steps=6)
    scheduler = make_scheduler(base, config, [5])
    scheduler.set_timesteps(6)
    levels = scheduler.alphas_cumprod.double().numpy()
    log_sigmas = np.log((1 - levels) / levels) / 2
    draws = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, 4, 8, 8, generator=draws) for _ in range(2))
    between = sampler == "dpmpp_sde"  # diffusers has no noise level for its points between two steps
    for time in scheduler.timesteps[: 6 if between else 3 : 2 if between else 1]:
        noisy = scheduler.add_noise(clean, noise, time.repeat(2))
        sigma = np.exp(np.interp(float(time), np.arange(1000), log_sigmas))
        a, s = 1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5
        answer = noise if prediction == "epsilon" else a * noise - s * clean
        found = clean_estimate(scheduler, answer, time, noisy)
        torch.testing.assert_close(found, clean, rtol=0, atol=2e-2)  # times are rounded


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler", "heun", "ddim", "unipc", "lcm"])
def test_it_ends_at_the_image_and_changes_nothing(micro_base: SDXLBase, sampler: Sampler) -> None:
    config = settings(sampler=sampler, scheduler=SOLVERS[sampler].schedules[0], steps=5, keep_latents=True)
    seen: list[Tensor] = []
    (watched,) = draw(micro_base, config, on_estimate=lambda latents, _: seen.append(latents))
    (plain,) = draw(micro_base, config)
    np.testing.assert_array_equal(watched.pixels, plain.pixels)
    assert len(seen) == SOLVERS[sampler].unet_calls(5)
    assert all(one.shape == (1, 4, 8, 8) and one.dtype == torch.float32 for one in seen)
    vae: Any = held(SHARED, "vae")
    end = scaled(watched.latents, vae.config)  # type: ignore[arg-type]
    distances = [float((one[0] - end).abs().mean()) for one in seen]
    assert distances[-1] < distances[0] / 3, distances


def test_a_batch_comes_as_a_batch(micro_base: SDXLBase) -> None:
    seen: list[Tensor] = []
    draw(micro_base, settings(count=3, batch_size=2, steps=1), on_estimate=lambda latents, _: seen.append(latents))
    assert [len(one) for one in seen] == [2, 1]
