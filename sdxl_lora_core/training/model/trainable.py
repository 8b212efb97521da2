"""The trainable model: the UNet and the text encoders with their adapters, and the losses of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...lora.files import read_lora
from ...lora.modules import LoRAFile
from ...sdxl.base import load_part, scheduler_config
from ...sdxl.family import ENCODERS, Part
from ..config.adapter import encoder_rate
from ..config.train_config import learning_encoders
from ..data.batches import Batch
from ..job import TrainingJob
from .adapter_init import require_same_parts
from .adapters import Adapter
from .objective import Objective
from .text_encoders import TrainedEncoders


class TrainableSDXL(nn.Module):
    """SDXL's UNet with its adapter, the text encoders that are trained, and the objective.

    `groups` are the float32 parameters to train in a fixed order, `parameters_to_train` all of them in a list. Raises
    ValueError if the LoRA of `continue_from`, or the rank of PiSSA, does not fit.
    """

    def __init__(self, job: TrainingJob, device: torch.device) -> None:
        from diffusers import DDPMScheduler

        super().__init__()
        base, config, dtype = job.base, job.config, job.dtype(device)
        self.dtype = dtype
        self.objective = Objective(DDPMScheduler.from_config(scheduler_config(base)), config)
        self.objective.to(device)
        start = read_lora(Path(config.continue_from)) if config.continue_from else None
        if start:
            require_same_parts(start, config, [part for part in ENCODERS if encoder_rate(config, part)])
        self.unet: Any = load_part(base, "unet", dtype, device)
        self.adapters: dict[Part, Adapter] = {}
        if config.train_unet:
            self.adapters["unet"] = Adapter(self.unet, config, "unet", start)
        trains_text = bool(learning_encoders(config))
        self.encoders = TrainedEncoders(job, start, device) if trains_text else None
        if self.encoders:
            self.adapters |= self.encoders.adapters
        self.groups = [group for adapter in self.adapters.values() for group in adapter.groups]
        self.groups += self.encoders.token_groups if self.encoders else []
        self.parameters_to_train = [parameter for group in self.groups for parameter in group.parameters]

    def learned(self) -> LoRAFile:
        """The present weights of the adapters and the new tokens, without metadata."""
        file = LoRAFile(tokens=self.encoders.tokens() if self.encoders else {})
        for part, adapter in self.adapters.items():
            file.parts()[part].update(adapter.modules())
        return file

    def losses(self, batch: Batch) -> Tensor:
        """The weighted loss of each sample, float32 [B]."""
        losses = self.objective.losses(self.predict(batch), batch.latents, batch.noise, batch.timesteps, batch.masks)
        return losses * batch.weights

    def squared_errors(self, batch: Batch) -> Tensor:
        """The unweighted mean squared error of each sample, float32 [B]."""
        return self.objective.squared_errors(
            self.predict(batch), batch.latents, batch.noise, batch.timesteps, batch.masks
        )

    def predict(self, batch: Batch) -> Tensor:
        """The UNet's prediction for the noisy samples, [B, 4, H/8, W/8]."""
        embeds, pooled = batch.embeds, batch.pooled
        if self.encoders:
            embeds, pooled = self.encoders(batch.captions, embeds, pooled)
        noisy = self.objective.noisy(batch.latents, batch.input_noise, batch.timesteps)
        return self.unet(
            noisy.to(self.dtype),
            batch.timesteps,
            encoder_hidden_states=embeds,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": batch.time_ids},
        ).sample
