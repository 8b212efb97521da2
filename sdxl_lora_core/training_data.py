"""What each optimizer update sees: latents, noise, timestep, prompt, in an order that can be repeated.

Everything random is a function of (seed, step, position in the effective batch); order is one of (seed, epoch). The
global random state is neither used nor moved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import precompute
from .base_model import SDXLBase
from .buckets import epoch_batches
from .dataset import CaptionDataset, CaptionEntry
from .losses import Objective
from .precompute import OnItem, Sample
from .train_config import TrainConfig

VALIDATION_TIMESTEPS = (100, 300, 500, 700, 900)


@dataclass(frozen=True)
class Batch:
    """Tensors of one forward pass on the device. latents, noise and input_noise are float32 [B, 4, H/8, W/8].

    The UNet is asked for noise, and sees latents with input_noise.
    """

    latents: Tensor
    noise: Tensor
    input_noise: Tensor
    timesteps: Tensor
    embeds: Tensor
    pooled: Tensor
    time_ids: Tensor


class TrainingData:
    """The samples and what they are conditioned on, drawn by step and position only."""

    def __init__(
        self, base: SDXLBase, dataset: CaptionDataset, config: TrainConfig, cache: Path, device: torch.device,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.base, self.config, self.cache_folder, self.device, self.dtype = base, config, cache, device, dtype
        self.entries = dataset.entries
        self.variants = [self._variants(entry) for entry in dataset.entries]
        self.validation = [
            precompute.make_sample(base, entry, False, cache, dtype, device) for entry in dataset.validation
        ]
        self.empty_prompt = precompute.prompt_file(base, "", cache, dtype, device)
        self.buckets = [(v[0].crop.bucket_w, v[0].crop.bucket_h) for v in self.variants]
        self._epochs: dict[int, list[list[int]]] = {}
        self._per_epoch = len(self._epoch(0))

    def _variants(self, entry: CaptionEntry) -> list[Sample]:
        orientations = (False, True) if entry.flip else (False,)
        return [
            precompute.make_sample(self.base, entry, mirrored, self.cache_folder, self.dtype, self.device)
            for mirrored in orientations
        ]

    def cache(self, on_item: OnItem) -> None:
        """Makes every tensor that is not on disk yet."""
        samples = [sample for variants in self.variants for sample in variants] + self.validation
        prompts = dict.fromkeys(sample.entry.caption for sample in samples)
        if self.config.caption_dropout > 0:
            prompts[""] = None
        precompute.cache_prompts(self.base, prompts, self.cache_folder, self.device, self.dtype, on_item)
        precompute.cache_latents(self.base, samples, self.device, on_item)

    def micro_batches(self, step: int) -> list[list[int]]:
        """The image indices of each forward pass of this optimizer update."""
        first = step * self.config.gradient_accumulation
        numbers = range(first, first + self.config.gradient_accumulation)
        return [self._epoch(number // self._per_epoch)[number % self._per_epoch] for number in numbers]

    def _epoch(self, epoch: int) -> list[list[int]]:
        if epoch not in self._epochs:
            repeats = [entry.repeats for entry in self.entries]
            batches = epoch_batches(self.buckets, repeats, self.config.batch_size, self.config.seed, epoch)
            self._epochs = {epoch: batches}
        return self._epochs[epoch]

    def batch(self, indices: Sequence[int], step: int, first_position: int, objective: Objective) -> Batch:
        rows = []
        for position, index in enumerate(indices, start=first_position):
            draw = generator(self.config.seed, step, position)
            variants = self.variants[index]
            chance = torch.rand(2, generator=draw)
            sample = variants[int(chance[0] * len(variants))]
            prompt = self.empty_prompt if chance[1] < self.config.caption_dropout else sample.prompt_file
            timestep = objective.timestep(draw)
            latents = _latents(sample, draw)
            noise = objective.noise(latents, draw)
            rows.append(_row(sample, prompt, latents, noise, objective.input_noise(noise, draw), timestep))
        return self._stack(rows)

    def validation_batches(self) -> Iterator[Batch]:
        """Every held-out image at fixed timesteps with fixed noise, whatever the run's seed, so that runs compare."""
        for position, sample in enumerate(self.validation):
            for timestep in VALIDATION_TIMESTEPS:
                draw = generator(0, timestep, position)
                latents = _latents(sample, draw)
                noise = torch.randn(latents.shape, generator=draw)
                yield self._stack([_row(sample, sample.prompt_file, latents, noise, noise, timestep)])

    def _stack(self, rows: list[tuple[Tensor, ...]]) -> Batch:
        latents, noise, input_noise, timesteps, embeds, pooled, time_ids = (
            torch.stack(column) for column in zip(*rows, strict=True)
        )
        return Batch(
            latents=latents.to(self.device),
            noise=noise.to(self.device),
            input_noise=input_noise.to(self.device),
            timesteps=timesteps.to(self.device),
            embeds=embeds.to(self.device, self.dtype),
            pooled=pooled.to(self.device, self.dtype),
            time_ids=time_ids.to(self.device),
        )


def _latents(sample: Sample, draw: torch.Generator) -> Tensor:
    """A fresh draw from the VAE's posterior, [4, H/8, W/8]."""
    mean, std = sample.posterior()
    return mean + std * torch.randn(mean.shape, generator=draw)


def _row(
    sample: Sample, prompt_file: Path, latents: Tensor, noise: Tensor, input_noise: Tensor, timestep: int
) -> tuple[Tensor, ...]:
    return latents, noise, input_noise, torch.tensor(timestep), *precompute.load_prompt(prompt_file), sample.time_ids()


def generator(seed: int, step: int, position: int) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments."""
    digest = hashlib.sha256(f"{seed}/{step}/{position}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
