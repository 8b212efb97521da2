"""Diffusers' schedulers for the samplers and schedules of a request, on the noise schedule of the base."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..sdxl.base import SDXLBase, scheduler_config
from ..sdxl.noise_levels import progress_of
from .config import GenerateConfig
from .samplers import SOLVERS, Solver

_SPACINGS = {
    "karras": "use_karras_sigmas",  # Karras et al., arXiv 2206.00364
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",  # Lee et al., arXiv 2407.12173
}
_OTHER_SPACINGS = ("use_lu_lambdas", "use_flow_sigmas")


def scheduler_settings(base: SDXLBase, config: GenerateConfig) -> dict[str, Any]:
    """The settings of the scheduler except the seed: noise schedule, solver and spacing of noise levels.

    Raises ValueError for a sampler or schedule that cannot start at zero SNR, if the base has it.
    """
    solver = SOLVERS[config.sampler]
    noise = scheduler_config(base)
    if base.zero_terminal_snr:
        _require_zero_snr(config)
    eta = {"eta": solver.eta} if solver.eta else {}
    return {**noise, **solver.options, **eta, **_spacing(config, solver, noise)}


class DenoisingSchedule(NamedTuple):
    """One of diffusers' schedulers after `set_timesteps`, and the timesteps that remain to be run, noisiest first.

    `timesteps` are on the CPU, for the scheduler, which uses them as indices: on a GPU each step would wait for it.
    `on_device` are the same on the UNet's device.
    """

    scheduler: Any
    timesteps: Tensor
    on_device: Tensor

    @property
    def progress(self) -> list[float]:
        """For each timestep its position between the noisiest training level (0) and the cleanest (1)."""
        levels = self.scheduler.config.num_train_timesteps
        return [progress_of(timestep, levels) for timestep in self.timesteps.tolist()]


def denoising_schedule(
    base: SDXLBase, config: GenerateConfig, seeds: Sequence[int], device: torch.device
) -> DenoisingSchedule:
    """The last `config.steps` steps of a schedule with `config.schedule_steps`, for the images of these seeds."""
    scheduler = make_scheduler(base, config, seeds)
    scheduler.set_timesteps(config.schedule_steps, device=device)
    skipped = (config.schedule_steps - config.steps) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    on_device, scheduler.timesteps = scheduler.timesteps, scheduler.timesteps.cpu()
    return DenoisingSchedule(scheduler, scheduler.timesteps[skipped:], on_device[skipped:])


def make_scheduler(base: SDXLBase, config: GenerateConfig, seeds: Sequence[int]) -> Any:
    """A new scheduler for the images of these seeds."""
    settings = scheduler_settings(base, config)
    if config.sampler == "dpmpp_sde":
        settings["noise_sampler_seed"] = list(seeds)  # one Brownian path per image
    scheduler = _build(SOLVERS[config.sampler].scheduler, settings)
    if config.sampler == "euler_ancestral":
        scheduler.euler = _build(SOLVERS["euler"].scheduler, settings)
    if base.zero_terminal_snr and "rescale_betas_zero_snr" not in scheduler.config:
        scheduler.alphas_cumprod = _build(SOLVERS["euler"].scheduler, settings).alphas_cumprod
    return scheduler


def normal_sigmas(alphas_cumprod: np.ndarray, steps: int) -> np.ndarray:
    """The sigmas of ComfyUI's "normal" schedule: evenly spaced in time, interpolated between levels in log(sigma).

    Descending, without the final zero, which every scheduler appends.
    """
    log_sigmas = np.log((1 - alphas_cumprod) / alphas_cumprod) / 2
    levels = np.arange(len(log_sigmas))
    return np.exp(np.interp(np.linspace(levels[-1], 0, steps), levels, log_sigmas))


def _require_zero_snr(config: GenerateConfig) -> None:
    if config.sampler == "pndm":
        raise ValueError(
            "sampler is 'pndm', which cannot start from pure noise, as this base with zero terminal SNR requires: "
            "choose ddim or another sampler"
        )
    if config.scheduler == "ddim_uniform":
        raise ValueError(
            "scheduler is 'ddim_uniform', which leaves out the noisiest level, at which this base with zero terminal "
            "SNR must start: choose sgm_uniform"
        )


def _spacing(config: GenerateConfig, solver: Solver, noise: dict[str, Any]) -> dict[str, Any]:
    wanted = _SPACINGS.get(config.scheduler)
    spacing: dict[str, Any] = {name: False for name in (*_SPACINGS.values(), *_OTHER_SPACINGS) if name in noise}
    # A single step is at the noisiest level.
    from_end_to_end = {"timestep_spacing": "linspace" if config.schedule_steps > 1 else "trailing"}
    if wanted:
        return {**spacing, wanted: True, **({} if solver.own_range else from_end_to_end)}
    if config.scheduler == "sgm_uniform":
        return {**spacing, "timestep_spacing": "trailing"}
    if config.scheduler == "ddim_uniform":
        return {**spacing, "timestep_spacing": "leading", "steps_offset": 1}
    if config.sampler == "ddpm":
        return {**spacing, **from_end_to_end}  # the same levels, rounded to training levels
    # Euler schedulers derive the scale of the initial noise from the spacing; with this one it is ComfyUI's.
    return {**spacing, "timestep_spacing": "leading", "sigmas": config.scheduler}


def _build(name: str, settings: dict[str, Any]) -> Any:
    import diffusers

    scheduler_class: Any = getattr(diffusers, name)
    if name == "EulerAncestralDiscreteScheduler":
        scheduler_class = _with_eulers_sigmas()
    if name == "DPMSolverSDEScheduler":
        scheduler_class = _with_noise_of_cpu()
    if settings.get("sigmas") == "normal" and hasattr(scheduler_class, "_convert_to_karras"):
        scheduler_class = _with_normal_sigmas(scheduler_class)
        settings = {**settings, "use_karras_sigmas": True}
    known = inspect.signature(scheduler_class.__init__).parameters
    return scheduler_class.from_config({option: value for option, value in settings.items() if option in known})


@functools.cache
def _with_normal_sigmas(scheduler_class: type[Any]) -> type[Any]:
    """A subclass with the "normal" sigmas in place of Karras': schedulers differ in how, or if, they accept sigmas."""

    class WithNormalSigmas(scheduler_class):
        def _convert_to_karras(self, in_sigmas: np.ndarray, num_inference_steps: int | None = None) -> np.ndarray:
            return normal_sigmas(self.alphas_cumprod.numpy(), num_inference_steps or self.num_inference_steps)

    return WithNormalSigmas


@functools.cache
def _with_eulers_sigmas() -> type[Any]:
    """A subclass of the ancestral scheduler with Euler's noise levels: diffusers' own supports no other spacing."""
    from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler

    class WithEulersSigmas(EulerAncestralDiscreteScheduler):
        euler: EulerDiscreteScheduler

        def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
            super().set_timesteps(num_inference_steps, device)
            self.euler.set_timesteps(num_inference_steps, device)
            self.sigmas, self.timesteps = self.euler.sigmas, self.euler.timesteps

    return WithEulersSigmas


@functools.cache
def _with_noise_of_cpu() -> type[Any]:
    """A subclass that samples its noise on the CPU, as all others do: diffusers' own needs a generator of the device,
    which gives other images on each kind of device and does not exist on some."""
    from diffusers import DPMSolverSDEScheduler
    from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

    class WithNoiseOfCpu(DPMSolverSDEScheduler):
        def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **options: Any) -> Any:
            if self.noise_sampler is None:
                levels = self.sigmas[self.sigmas > 0].tolist()
                sampler = BrownianTreeNoiseSampler(sample.cpu(), min(levels), max(levels), self.noise_sampler_seed)
                self.noise_sampler = lambda *sigmas: sampler(*sigmas).to(sample.device)
            return super().step(model_output, timestep, sample, *args, **options)

    return WithNoiseOfCpu
