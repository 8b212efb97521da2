"""Images by diffusers' own pipelines for SDXL and SD 1.5 with its own schedulers, set up as its documentation does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdxl_lora_core.generation.config import GenerateConfig
from sdxl_lora_core.generation.samplers import Sampler, Schedule

MULTISTEP = {"scheduler": "DPMSolverMultistepScheduler"}
REFERENCES: dict[Sampler, dict[str, Any]] = {
    "dpmpp_2m": {**MULTISTEP, "algorithm_type": "dpmsolver++", "solver_order": 2},
    "dpmpp_2m_sde": {**MULTISTEP, "algorithm_type": "sde-dpmsolver++", "solver_order": 2},
    "dpmpp_3m": {**MULTISTEP, "algorithm_type": "dpmsolver++", "solver_order": 3},
    "dpmpp_sde": {"scheduler": "DPMSolverSDEScheduler"},
    "unipc": {"scheduler": "UniPCMultistepScheduler"},
    "euler": {"scheduler": "EulerDiscreteScheduler"},
    "euler_ancestral": {"scheduler": "EulerAncestralDiscreteScheduler"},
    "heun": {"scheduler": "HeunDiscreteScheduler"},
    "ddim": {"scheduler": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False},
    "ddpm": {"scheduler": "DDPMScheduler", "clip_sample": False},
    "pndm": {"scheduler": "PNDMScheduler", "skip_prk_steps": True},
    "lcm": {"scheduler": "LCMScheduler", "original_inference_steps": 1000},
    "tcd": {"scheduler": "TCDScheduler", "original_inference_steps": 1000},
}
SPACINGS: dict[Schedule, dict[str, Any]] = {
    "karras": {"use_karras_sigmas": True, "timestep_spacing": "linspace"},
    "exponential": {"use_exponential_sigmas": True, "timestep_spacing": "linspace"},
    "beta": {"use_beta_sigmas": True, "timestep_spacing": "linspace"},
    "sgm_uniform": {"timestep_spacing": "trailing"},
    "ddim_uniform": {"timestep_spacing": "leading"},
    "normal": {"timestep_spacing": "linspace"},
}


@functools.cache
def plain_pipeline(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipeline: Any = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def reference_pipeline(folder: Path, config: GenerateConfig) -> Any:
    import diffusers

    pipeline = plain_pipeline(folder)
    sampler, schedule = config.sampler, config.scheduler
    options = {**REFERENCES[sampler], **SPACINGS[schedule]}
    if sampler == "dpmpp_sde":
        options["noise_sampler_seed"] = config.seed
    own = {**diffusers.EulerDiscreteScheduler.load_config(folder / "scheduler"), "use_karras_sigmas": False}
    pipeline.scheduler = getattr(diffusers, options.pop("scheduler")).from_config(own, **options)
    if sampler == "euler_ancestral":
        euler = diffusers.EulerDiscreteScheduler.from_config(own, **SPACINGS[schedule])
        given_sigmas(pipeline.scheduler, lambda steps: (euler.set_timesteps(steps), euler.sigmas, euler.timesteps)[1:])
    elif schedule == "normal" and sampler.startswith(("dpmpp_2m", "dpmpp_3m", "unipc")):
        given_sigmas(pipeline.scheduler, lambda steps: comfyui_normal(pipeline.scheduler.alphas_cumprod, steps))
    elif schedule == "normal" and sampler == "dpmpp_sde":
        given_sigmas(pipeline.scheduler, lambda steps: with_middles(pipeline.scheduler, steps))
    return pipeline


def given_sigmas(scheduler: Any, levels: Callable[[int], tuple[torch.Tensor, torch.Tensor]]) -> None:
    """The scheduler's own reset, then other noise levels in its two public attributes."""
    own = scheduler.set_timesteps

    def set_timesteps(steps: int, device: Any = None) -> None:
        own(steps, device)
        scheduler.sigmas, scheduler.timesteps = levels(steps)

    scheduler.set_timesteps = set_timesteps


def comfyui_normal(alphas_cumprod: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sigmas with the zero at the end, and the nearest times."""
    log_sigmas = (((1 - alphas_cumprod) / alphas_cumprod) ** 0.5).log()
    times = torch.linspace(len(log_sigmas) - 1, 0, steps)
    low, high, part = times.floor().long(), times.ceil().long(), times.frac()
    sigmas = ((1 - part) * log_sigmas[low] + part * log_sigmas[high]).exp()
    return torch.cat([sigmas, torch.zeros(1)]), times.round().long()


def with_middles(scheduler: Any, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for DPM-Solver SDE, which stops between two levels."""
    sigmas = comfyui_normal(scheduler.alphas_cumprod, steps)[0]
    levels = sigmas[:-1].numpy().astype(float)
    log_sigmas = (((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5).log().numpy()
    times = np.array([scheduler._sigma_to_t(level, log_sigmas) for level in levels]).repeat(2)[1:]
    times[1::2] = scheduler._second_order_timesteps(levels, log_sigmas)
    return torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]]), torch.from_numpy(times)


def first_noise(pipeline: Any, config: GenerateConfig) -> torch.Tensor:
    """ComfyUI scales the first noise by sqrt(1 + sigma^2); Euler's family with linspace by sigma."""
    noise = torch.randn(
        (1, 4, config.height // 8, config.width // 8), generator=torch.Generator().manual_seed(config.seed)
    )
    pipeline.scheduler.set_timesteps(config.steps)
    scale = float(pipeline.scheduler.init_noise_sigma)
    return noise * (scale**2 + 1) ** 0.5 / scale if config.scheduler == "normal" and scale > 1 else noise


def reference(
    folder: Path, config: GenerateConfig, rescale: float = 0.0, steered: Callable[[Any], Any] = lambda _: _, **more: Any
) -> np.ndarray:
    """The image, [H, W, 3] from 0 to 255 and not rounded. `steered` makes another pipeline of the plain one, `more` are
    arguments for that."""
    pipeline = steered(reference_pipeline(folder, config))
    draws = torch.Generator().manual_seed(config.seed)
    latents = first_noise(pipeline, config)
    torch.randn(latents.shape, generator=draws)  # what comes after belongs to the steps
    image = pipeline(
        config.prompt,
        negative_prompt=config.negative_prompt,
        num_inference_steps=config.steps,
        guidance_scale=config.guidance,
        guidance_rescale=rescale,
        width=config.width,
        height=config.height,
        eta=0.3 if config.sampler == "tcd" else 0.0,
        generator=draws,
        latents=latents,
        output_type="np",
        **more,
    ).images[0]
    return image * 255
