"""The trainable model: the UNet and the text encoders with their adapters, and the losses of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...lora.files import read_lora
from ...lora.modules import LoRAFile
from ...runtime.device import move_module
from ...sdxl.base import load_part, scheduler_config
from ...sdxl.family import ENCODERS, Part
from ..config.adapter import encoder_rate
from ..config.train_config import learning_encoders
from ..data.batches import Batch
from ..job import TrainingJob
from .adapter_init import require_same_parts
from .adapters import Adapter
from .base_weights import WeightFormat, store_weights
from .flat_parameters import FlatParameters
from .objective import Objective
from .text_encoders import LoadPart, TrainedEncoders


class TrainableSDXL(nn.Module):
    """SDXL's UNet with its adapter, the text encoders that are trained, and the objective.

    `weights` and `offloaded` say how the UNet's frozen weights are stored (see store_weights). `load` loads a part; the
    memory plan gives one whose parts have no contents. `flat` holds the trained parameters. Raises ValueError if the
    LoRA of `continue_from`, or the rank of PiSSA, does not fit.
    """

    def __init__(
        self,
        job: TrainingJob,
        device: torch.device,
        weights: WeightFormat = "full",
        offloaded: int = 0,
        load: LoadPart = load_part,
    ) -> None:
        from diffusers import DDPMScheduler

        super().__init__()
        base, config, dtype = job.base, job.config, job.dtype(device)
        self.dtype, self.device = dtype, device
        self.objective = Objective(DDPMScheduler.from_config(scheduler_config(base)), config)
        self.objective.to(device)
        start = read_lora(Path(config.continue_from)) if config.continue_from else None
        if start:
            require_same_parts(start, config, [part for part in ENCODERS if encoder_rate(config, part)])
        shrinks = weights != "full" or offloaded > 0
        self.unet: Any = load(base, "unet", dtype, torch.device("cpu") if shrinks else device)
        self.adapters: dict[Part, Adapter] = {}
        if config.train_unet:
            self.adapters["unet"] = Adapter(self.unet, config, "unet", start)
        self.offloaded = store_weights(self.unet, weights, offloaded, device)
        move_module(self.unet, device)
        trains_text = bool(learning_encoders(config))
        self.encoders = TrainedEncoders(job, start, device, load) if trains_text else None
        if self.encoders:
            self.adapters |= self.encoders.adapters
        self.flat = self._flat_parameters()

    def _flat_parameters(self) -> FlatParameters:
        groups = [group for adapter in self.adapters.values() for group in adapter.groups]
        groups += self.encoders.token_groups if self.encoders else []
        scales = {name: scale for adapter in self.adapters.values() for name, scale in adapter.scales.items()}
        flat = FlatParameters(groups, scales, self.dtype)
        for adapter in self.adapters.values():
            adapter.fuse(flat)
        return flat

    def move(self, device: torch.device) -> None:
        """Moves all weights, between steps. Offloaded ones are copied to the device of the steps when needed."""
        move_module(self, device)
        self.flat.to(device)
        if self.offloaded:
            self.offloaded.evict()

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
