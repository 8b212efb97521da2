from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from sdxl_lora_core.sdxl.base import SDXLBase, scheduler_config
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.model.objective import Objective
from sdxl_lora_core.training.monitor.charts import smoothed


def objective(base: SDXLBase, prediction_type: str = "epsilon", **settings: Any) -> Objective:
    scheduler = DDPMScheduler.from_config(scheduler_config(base), prediction_type=prediction_type)
    return Objective(scheduler, TrainConfig(**settings))


def test_targets_match_their_closed_forms(micro_base: SDXLBase) -> None:
    latents, noise, timesteps = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = torch.cumprod(1 - betas, 0)[timesteps].view(-1, 1, 1, 1)
    epsilon, v = objective(micro_base), objective(micro_base, "v_prediction")
    assert epsilon.target(latents, noise, timesteps) is noise
    velocity = kept.sqrt() * noise - (1 - kept).sqrt() * latents
    torch.testing.assert_close(v.target(latents, noise, timesteps), velocity)
    noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
    torch.testing.assert_close(epsilon.noisy(latents, noise, timesteps), noisy)


def test_another_prediction_type_is_refused(micro_base: SDXLBase) -> None:
    with pytest.raises(ValueError, match="prediction_type is 'sample'"):
        objective(micro_base, "sample")


def test_the_loss_is_the_mean_square_of_each_sample_in_fp32(micro_base: SDXLBase) -> None:
    prediction = torch.stack([torch.full((4, 2, 2), 3.0), torch.zeros(4, 2, 2)]).bfloat16()
    nothing = torch.zeros(2, 4, 2, 2)
    losses = objective(micro_base).losses(prediction, nothing, nothing, torch.tensor([1, 999]))
    assert losses.dtype == torch.float32 and losses.tolist() == [9.0, 0.0]


def test_smoothing_starts_at_the_first_value_and_passes_over_nan() -> None:
    assert smoothed([2.0, 2.0, math.nan, 2.0]) == pytest.approx([2.0] * 4)
    assert smoothed([1.0] * 200 + [0.0] * 200, span=20)[-1] < 0.01
    assert math.isnan(smoothed([math.nan])[0])
