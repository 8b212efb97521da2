"""Each setting of the loss against its closed form, and that the training loop uses it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors import safe_open
from torch import Tensor

from sdxl_lora_core.cli.run_file import read_run
from sdxl_lora_core.hashed_random import generator
from sdxl_lora_core.sdxl.base import SDXLBase, open_base, scheduler_config
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.data.batches import PassOfUpdate
from sdxl_lora_core.training.data.noise import NoiseSampler
from sdxl_lora_core.training.model.objective import Objective
from sdxl_lora_core.training.train import as_trained
from tests.micro.runs import SMALL, Cancelled, Train, Trained, cancel_at, data_of, load, lora_bytes

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
KEPT = torch.cumprod(1 - BETAS, 0)
SNR = KEPT / (1 - KEPT)
SOME = torch.tensor([0, 1, 250, 500, 750, 998])


def objective(base: SDXLBase, **settings: Any) -> Objective:
    config = TrainConfig(**settings)
    return Objective(DDPMScheduler.from_config(scheduler_config(as_trained(base, config))), config)


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(0, 0, 0))


def test_nothing_is_weighted_by_default(micro_base: SDXLBase) -> None:
    assert torch.equal(objective(micro_base).weights, torch.ones(1000))


def test_min_snr_weights_are_the_papers(micro_base: SDXLBase) -> None:
    epsilon = objective(micro_base, snr_gamma=5.0).weights
    v = objective(micro_base, snr_gamma=5.0, prediction="v_prediction").weights
    torch.testing.assert_close(epsilon[SOME], (SNR.clamp(max=5) / SNR)[SOME])
    torch.testing.assert_close(v[SOME], (SNR.clamp(max=5) / (SNR + 1))[SOME])


def test_debiased_weights_are_the_papers(micro_base: SDXLBase) -> None:
    torch.testing.assert_close(objective(micro_base, debiased=True).weights[SOME], (1 / SNR.sqrt())[SOME])


@pytest.mark.parametrize("weighting", [{"snr_gamma": 5.0}, {"debiased": True}], ids=str)
def test_epsilon_and_v_weigh_the_same_miss_of_the_image_alike(micro_base: SDXLBase, weighting: dict[str, Any]) -> None:
    latents, noise, guess = normal(3, 6, 4, 2, 2)
    alpha, sigma = (value[SOME].view(-1, 1, 1, 1) for value in (KEPT.sqrt(), (1 - KEPT).sqrt()))
    noisy = alpha * latents + sigma * noise
    as_epsilon, as_v = (noisy - alpha * guess) / sigma, (alpha * noisy - guess) / sigma
    by_epsilon = objective(micro_base, **weighting).losses(as_epsilon, latents, noise, SOME)
    by_v = objective(micro_base, prediction="v_prediction", **weighting).losses(as_v, latents, noise, SOME)
    torch.testing.assert_close(by_epsilon, by_v, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"loss": "huber"}, [0.5 * 0.05**2, 0.1 * (0.5 - 0.05)]),
        ({"loss": "huber", "huber_delta": 0.2}, [0.5 * 0.05**2, 0.2 * (0.5 - 0.1)]),
        ({"loss": "smooth_l1"}, [0.5 * 0.05**2 / 0.1, 0.5 - 0.05]),
        ({"loss": "smooth_l1", "huber_delta": 0.2}, [0.5 * 0.05**2 / 0.2, 0.5 - 0.1]),
    ],
    ids=str,
)
def test_robust_losses_are_quadratic_then_linear(
    micro_base: SDXLBase, settings: dict[str, Any], wanted: list[float]
) -> None:
    nothing = torch.zeros(2, 4, 2, 2)
    off = torch.tensor([0.05, 0.5]).view(2, 1, 1, 1).expand_as(nothing)
    chosen = objective(micro_base, **settings)
    assert chosen.losses(off, nothing, nothing, torch.tensor([1, 2])).tolist() == pytest.approx(wanted)
    assert chosen.squared_errors(off, nothing, nothing, torch.tensor([1, 2])).tolist() == pytest.approx([0.0025, 0.25])


def test_noise_offset_moves_each_channel_as_a_whole() -> None:
    plain, moved = (
        NoiseSampler(TrainConfig(noise_offset=offset)).noise(torch.zeros(4, 8, 8), generator(0, 0, 0))
        for offset in (0.0, 0.5)
    )
    shift = moved - plain
    torch.testing.assert_close(shift, shift[:, :1, :1].expand_as(shift), atol=1e-6, rtol=0)
    draws = [
        NoiseSampler(TrainConfig(noise_offset=0.5)).noise(torch.zeros(4, 8, 8), generator(0, i, 0)) for i in range(99)
    ]
    spread = torch.stack(draws).mean(dim=(2, 3)).std().item()
    assert spread == pytest.approx(math.sqrt(0.25 + 1 / 64), rel=0.15)


def coarseness(**settings: Any) -> float:
    """How alike neighbours are in the noise; 0 in white noise."""
    noise = NoiseSampler(TrainConfig(**settings)).noise(torch.zeros(4, 64, 64), generator(0, 0, 0))
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    return (noise[:, :, 1:] * noise[:, :, :-1]).mean().item()


def test_multires_noise_is_coarser_with_more_layers_and_less_discount() -> None:
    white, one, six = (coarseness(multires_noise_iterations=layers) for layers in (0, 1, 6))
    strong = coarseness(multires_noise_iterations=6, multires_noise_discount=0.8)
    assert white < one < six < strong


def test_the_perturbed_input_is_not_what_is_asked_for(micro_base: SDXLBase, pictures: Path, cache: Path) -> None:
    dataset = load(pictures)
    plain, perturbed = (
        data_of(micro_base, dataset, cache, input_perturbation=gamma).batch(PassOfUpdate(0, (0,)))
        for gamma in (0.0, 0.25)
    )
    assert torch.equal(plain.input_noise, plain.noise) and torch.equal(perturbed.noise, plain.noise)
    assert (perturbed.input_noise - perturbed.noise).std().item() == pytest.approx(0.25, rel=0.2)


def timesteps(**settings: Any) -> Tensor:
    chosen = NoiseSampler(TrainConfig(**settings))
    return torch.tensor([chosen.timestep(generator(0, step, 0)) for step in range(2000)])


def test_timesteps_fill_their_range(micro_base: SDXLBase) -> None:
    drawn = timesteps(timestep_min=100, timestep_max=103)
    assert drawn.unique().tolist() == [100, 101, 102, 103]
    normal = timesteps(timestep_min=100, timestep_max=103, timestep_sampling="logit_normal", logit_std=3.0)
    assert normal.unique().tolist() == [100, 101, 102, 103]


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.0, 1.0), (0.0, 0.25)])
def test_logit_normal_timesteps_have_their_quantiles(micro_base: SDXLBase, mean: float, std: float) -> None:
    drawn = timesteps(timestep_sampling="logit_normal", logit_mean=mean, logit_std=std) / 1000
    for share, deviations in ((0.1587, -1), (0.5, 0), (0.8413, 1)):
        wanted = 1 / (1 + math.exp(-(mean + std * deviations)))
        assert drawn.quantile(share).item() == pytest.approx(wanted, abs=0.025)


def test_zero_terminal_snr_rescales_the_schedule(micro_base: SDXLBase) -> None:
    """Lin et al., arXiv 2305.08891, algorithm 1."""
    scheduler = objective(micro_base, prediction="v_prediction", zero_terminal_snr="on").scheduler
    root = KEPT.sqrt()
    wanted = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    torch.testing.assert_close(scheduler.alphas_cumprod, wanted, atol=1e-6, rtol=1e-4)
    assert scheduler.alphas_cumprod[-1] == 0


@pytest.mark.parametrize("weighting", [{}, {"snr_gamma": 5.0}, {"debiased": True}], ids=str)
def test_the_loss_is_finite_down_to_pure_noise(micro_base: SDXLBase, weighting: dict[str, Any]) -> None:
    latents, noise, guess = normal(3, 2, 4, 2, 2)
    chosen = objective(micro_base, prediction="v_prediction", zero_terminal_snr="on", **weighting)
    assert chosen.losses(guess, latents, noise, torch.tensor([0, 999])).isfinite().all()
    torch.testing.assert_close(chosen.target(latents, noise, torch.tensor([0, 999]))[1], -latents[1])


def test_epsilon_at_pure_noise_is_refused_by_name(micro_base: SDXLBase) -> None:
    with pytest.raises(ValueError, match="would predict epsilon with zero terminal SNR.*timestep_max to 998"):
        as_trained(micro_base, TrainConfig(zero_terminal_snr="on"))
    below = objective(micro_base, zero_terminal_snr="on", timestep_max=998, debiased=True)
    assert below.weights[:999].isfinite().all()


def test_a_base_trains_as_its_file_says_unless_told_otherwise(micro_base: SDXLBase) -> None:
    v_base = replace(micro_base, prediction_type="v_prediction", zero_terminal_snr=True)
    assert as_trained(v_base, TrainConfig()) == v_base
    plain = as_trained(v_base, TrainConfig(prediction="epsilon", zero_terminal_snr="off"))
    assert (plain.prediction_type, plain.zero_terminal_snr) == ("epsilon", False)
    assert as_trained(micro_base, TrainConfig(prediction="v_prediction")).prediction_type == "v_prediction"


def test_an_override_trains_as_the_marked_base_and_the_file_says_so(
    run: Train, trained: Trained, micro_base: SDXLBase
) -> None:
    marked = replace(micro_base, prediction_type="v_prediction", zero_terminal_snr=True)
    by_itself = run(base=marked)
    config = replace(SMALL, prediction="v_prediction", zero_terminal_snr="on")
    overridden = trained(config)
    assert lora_bytes(by_itself) == lora_bytes(overridden) != lora_bytes(trained())
    header = metadata(overridden.lora_path)
    assert header["modelspec.prediction_type"] == "v" and header["ss_v_parameterization"] == "True"
    assert header["ss_zero_terminal_snr"] == "True"


def test_said_of_the_base_or_of_the_run_it_is_the_same_run(run: Train, micro_base: SDXLBase, tmp_path: Path) -> None:
    said = open_base(micro_base.path, "fp32", prediction="v_prediction", zero_terminal_snr="on")
    by_base = run(base=said)
    config = replace(SMALL, prediction="v_prediction", zero_terminal_snr="on")
    again = run(config)
    assert not by_base.reused and again.reused and again.lora_path == by_base.lora_path
    assert not run().reused, "without it, it is another run"
    job = read_run(tmp_path / "a/runs/small/run.yaml", None)
    base, dataset, config = job.base, job.dataset, job.config
    assert base == said
    assert run(config, base=base, dataset=dataset).lora_path == by_base.lora_path
    assert as_trained(said, TrainConfig(prediction="epsilon", zero_terminal_snr="off")) == micro_base, "the run's win"


EVERYTHING = {
    "loss": "huber",
    "huber_delta": 0.3,
    "snr_gamma": 5.0,
    "multires_noise_iterations": 3,
    "multires_noise_discount": 0.6,
    "input_perturbation": 0.1,
    "timestep_min": 50,
    "timestep_max": 900,
    "timestep_sampling": "logit_normal",
    "logit_mean": 0.5,
    "logit_std": 0.8,
}


def test_a_cancelled_run_continues_to_the_same_bytes_and_names_what_it_used(run: Train) -> None:
    config = replace(SMALL, **EVERYTHING)
    whole = run(config)
    with pytest.raises(Cancelled):
        run(config, where="b", on_step=cancel_at(2))
    assert lora_bytes(run(config, where="b")) == lora_bytes(whole)
    header = metadata(whole.lora_path)
    assert header["ss_min_snr_gamma"] == "5.0" and header["ss_loss_type"] == "huber"
    assert header["ss_ip_noise_gamma"] == "0.1" and "ss_noise_offset" not in header


@pytest.mark.parametrize(
    "change", [{"loss": "huber"}, {"snr_gamma": 5.0}, {"input_perturbation": 0.3}, {"noise_offset": 0.1}], ids=str
)
def test_the_loop_trains_by_it_and_validates_without_it(trained: Trained, change: dict[str, Any]) -> None:
    plain, changed = (trained(config, validation_percent=20) for config in (SMALL, replace(SMALL, **change)))
    assert plain.report.loss != changed.report.loss
    assert plain.report.validation_loss_before == changed.report.validation_loss_before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"snr_gamma": 5.0, "debiased": True}, "snr_gamma is 5.0 and debiased is on"),
        ({"noise_offset": 0.1, "multires_noise_iterations": 6}, "noise_offset is 0.1 and multires_noise_iterations"),
        ({"timestep_min": 500, "timestep_max": 400}, "timestep_min is 500 and timestep_max is 400"),
        ({"loss": "l3"}, "loss is 'l3': choose one of mse, huber, smooth_l1"),
    ],
)
def test_settings_that_contradict_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)
