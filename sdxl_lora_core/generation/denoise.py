"""The denoising loop around one of diffusers' schedulers: noise in, clean latents out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..control.control_residuals import ActiveControl, control_residuals
from .guidance import Guidance
from .init_images import Generators, Inpainting
from .schedulers import DenoisingSchedule
from .x0_estimate import OnEstimate, clean_estimate

OnStep = Callable[[int], object]
StepOptions = dict[str, Any]


class Conditioning(NamedTuple):
    """Inputs of the UNet beside latents and timestep, one row for each row of its batch.

    `embeds` [rows, tokens, 2048]; `added` are SDXL's text_embeds [rows, 1280] and time_ids [rows, 6]. With guidance the
    first half of the rows belongs to the negative prompt.
    """

    embeds: Tensor
    added: Mapping[str, Tensor]

    def last(self, rows: int) -> Conditioning:
        return Conditioning(self.embeds[-rows:], {name: tensor[-rows:] for name, tensor in self.added.items()})


@dataclass(frozen=True)
class Denoiser:
    """Denoises batches of latents with `unet`.

    `guidance` None turns classifier-free guidance off: the UNet then sees the prompts alone. `inpainting` restores the
    kept area after each step. `on_estimate` gets an estimate of the clean latents before each step. `scale_embedding`
    is for UNets that take the guidance scale as an input.
    """

    unet: Any
    schedule: DenoisingSchedule
    guidance: Guidance | None
    controls: Sequence[ActiveControl] = ()
    inpainting: Inpainting | None = None
    on_estimate: OnEstimate | None = None
    scale_embedding: Tensor | None = None

    def denoise(self, latents: Tensor, conditioning: Conditioning, options: StepOptions, on_step: OnStep) -> Tensor:
        """Returns the clean latents, [B, 4, h, w]. `options` are passed to each step of the scheduler.

        `on_step` gets the number of UNet calls done and may raise to cancel.
        """
        scheduler, timesteps, on_device = self.schedule
        steps = zip(timesteps, on_device, self.schedule.progress, strict=True)
        for number, (timestep, of_unet, progress) in enumerate(steps, 1):
            sample = scheduler.scale_model_input(latents, timestep)
            prediction = self._predict(sample, of_unet, progress, conditioning)
            if self.on_estimate:
                self.on_estimate(clean_estimate(scheduler, prediction, timestep, latents))
            denoised = scheduler.step(prediction, timestep, latents, **options, return_dict=False)[0]
            latents = denoised.to(latents.dtype)
            on_step(number)
            if self.inpainting:
                latents = self.inpainting.restored(latents, scheduler, timesteps[number : number + 1])
        return latents

    def _predict(self, sample: Tensor, timestep: Tensor, progress: float, conditioning: Conditioning) -> Tensor:
        """The prediction for latents in the scale of the UNet's input, steered by ControlNets and guidance.

        Outside the guidance interval the UNet sees the prompts alone, at half the cost, and their prediction stands for
        that of the negative prompt as well.
        """
        guided = self.guidance is not None and self.guidance.is_active(progress)
        sample = torch.cat([sample] * 2) if guided else sample
        embeds, added = conditioning.last(len(sample))
        inputs = {
            "encoder_hidden_states": embeds,
            "added_cond_kwargs": added,
            "return_dict": False,
        }
        residuals = control_residuals(self.controls, progress, sample, timestep, inputs)
        prediction = self.unet(sample, timestep, timestep_cond=self.scale_embedding, **inputs, **residuals)[0]
        if self.guidance is None:
            return prediction
        unconditional, conditional = prediction.chunk(2) if guided else (prediction, prediction)
        return self.guidance.combine(unconditional, conditional)


def step_options(scheduler: Any, generators: Generators, eta: float) -> StepOptions:
    """The arguments that this scheduler's `step` accepts: `eta`, and the generators of its noise."""
    accepted = inspect.signature(scheduler.step).parameters
    options = {"eta": eta, "generator": list(generators)}
    return {name: value for name, value in options.items() if name in accepted}
