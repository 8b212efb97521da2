"""What learns, and what it says of a batch: the UNet and the text encoders with their adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...lora.files import read_lora
from ...lora.modules import LoRAFile
from ...sdxl.base import SDXLBase, load_part, scheduler_config
from ...sdxl.loading import ENCODERS, Part
from ..config.adapter import encoder_rate
from ..config.train_config import TrainConfig, learning_encoders
from ..data.batches import Batch
from .adapter_init import require_same_parts
from .adapters import Adapter
from .objective import Objective
from .text_encoders import LearningEncoders


class Learner(nn.Module):
    """SDXL's UNet, the text encoders that learn, and the objective that they learn by.

    `groups` hold the float32 parameters that learn, in an order that is the same every time; `learning` are all of
    them in a row. Raises ValueError where the LoRA of `continue_from`, or the rank of PiSSA, does not fit.
    """

    def __init__(self, base: SDXLBase, config: TrainConfig, device: torch.device, dtype: torch.dtype) -> None:
        from diffusers import DDPMScheduler

        super().__init__()
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
        learns_text = bool(learning_encoders(config))
        self.encoders = LearningEncoders(base, config, start, device, dtype) if learns_text else None
        if self.encoders:
            self.adapters |= self.encoders.adapters
        self.groups = [group for adapter in self.adapters.values() for group in adapter.groups]
        self.groups += self.encoders.token_groups if self.encoders else []
        self.learning = [parameter for group in self.groups for parameter in group.parameters]

    def learned(self) -> LoRAFile:
        """What the adapters and the new tokens hold now, without metadata."""
        file = LoRAFile(tokens=self.encoders.tokens() if self.encoders else {})
        for part, adapter in self.adapters.items():
            file.parts()[part].update(adapter.modules())
        return file

    def losses(self, batch: Batch) -> Tensor:
        """The loss of each sample, times its weight, float32 [B]."""
        losses = self.objective.losses(self.predict(batch), batch.latents, batch.noise, batch.timesteps, batch.masks)
        return losses * batch.weights

    def squared_errors(self, batch: Batch) -> Tensor:
        """The plain error of each sample, float32 [B]."""
        return self.objective.squared_errors(
            self.predict(batch), batch.latents, batch.noise, batch.timesteps, batch.masks
        )

    def predict(self, batch: Batch) -> Tensor:
        """What the UNet says of the noisy samples, [B, 4, H/8, W/8]."""
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
