"""What each optimizer update sees: latents, noise, timestep, prompt, in an order that can be repeated.

Everything random is a function of (seed, step, position in the effective batch); order is one of (seed, epoch). The
global random state is neither used nor moved.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...cache.tensor_cache import OnItem
from ...dataset.buckets import epoch_batches
from ...dataset.caption_dataset import CaptionDataset, CaptionEntry
from ...dataset.captions import holds_word
from ...hashed_random import generator, pick
from ...images.crop import Crop
from ...sdxl.base import SDXLBase
from ...sdxl.loading import ENCODERS
from ...text.encoding import stack_embeds
from ...text.prompt_cache import cache_prompts, load_prompt, prompt_file
from ..config.captions import placeholder_ids, tokens_of
from ..config.train_config import TrainConfig, learning_encoders
from .caption_variants import caption_variants, cut_captions
from .latent_cache import Sample, cache_latents, cache_masks, make_sample
from .noise import NoiseSampler

log = logging.getLogger("sdxl_lora")

VALIDATION_TIMESTEPS = (100, 300, 500, 700, 900)


@dataclass(frozen=True)
class Batch:
    """Tensors of one forward pass on the device. latents, noise and input_noise are float32 [B, 4, H/8, W/8].

    The UNet is asked for noise, and sees latents with input_noise. embeds [B, T, C] and pooled [B, P] are those of the
    captions, None where both text encoders learn. weights [B] are those of the loss; masks are float32
    [B, 1, H/8, W/8], 1 where the image is learned, or None.
    """

    latents: Tensor
    noise: Tensor
    input_noise: Tensor
    timesteps: Tensor
    captions: tuple[str, ...]
    embeds: Tensor | None
    pooled: Tensor | None
    time_ids: Tensor
    weights: Tensor
    masks: Tensor | None


@dataclass(frozen=True)
class Row:
    """One sample of a batch, on the CPU."""

    sample: Sample
    caption: str
    latents: Tensor
    noise: Tensor
    input_noise: Tensor
    timestep: int
    weight: float = 1.0


class TrainingData:
    """The samples and what they are conditioned on, drawn by step and position only.

    `captions` are the texts that each image may be shown with; `prompt_files` hold the embeddings of all of them. There
    are none where both text encoders learn.
    """

    def __init__(
        self,
        base: SDXLBase,
        dataset: CaptionDataset,
        config: TrainConfig,
        cache: Path,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.base, self.config, self.cache_folder, self.device, self.dtype = base, config, cache, device, dtype
        self.entries = (*dataset.entries, *dataset.regularisation)
        if config.masked_loss and not any(entry.mask for entry in self.entries):
            raise ValueError(
                f"masked_loss is on and no image of {dataset.name} has a mask or an alpha channel: "
                "put masks/<name>.png into the folder, or turn masked_loss off"
            )
        self.noise = NoiseSampler(config)
        self.variants = [self._variants(entry) for entry in self.entries]
        words = all_trigger_words(dataset, config)
        self.captions = [self._captions(entry, words) for entry in dataset.entries]
        self.captions += [entry.captions for entry in dataset.regularisation]
        self.first_regularisation = len(dataset.entries)
        self.validation = [self._sample(entry, entry.center, mirrored=False) for entry in dataset.validation]
        self.reads_prompts = len(learning_encoders(config)) < len(ENCODERS)
        captions = self._all_captions() if self.reads_prompts else ()
        self.prompt_files = {caption: self._prompt_file(caption) for caption in captions}
        self.buckets = [entry.bucket for entry in self.entries]
        self._epochs: dict[int, list[list[int]]] = {}
        self._per_epoch = len(self._epoch(0))

    def _variants(self, entry: CaptionEntry) -> list[Sample]:
        orientations = (False, True) if entry.flip else (False,)
        return [self._sample(entry, crop, mirrored) for crop in entry.crops for mirrored in orientations]

    def _sample(self, entry: CaptionEntry, crop: Crop, mirrored: bool) -> Sample:
        return make_sample(self.base, entry, crop, mirrored, self.cache_folder)

    def _captions(self, entry: CaptionEntry, trigger_words: Sequence[str]) -> tuple[str, ...]:
        return caption_variants(entry.captions, entry.sha256, trigger_words, self.config)

    def _all_captions(self) -> list[str]:
        shown = [caption for captions in self.captions for caption in captions]
        shown += [sample.entry.caption for sample in self.validation]
        return [*shown, ""] if self.config.caption_dropout > 0 else shown

    def _prompt_file(self, caption: str) -> Path:
        chunks = self.config.caption_chunks
        return prompt_file(self.base, caption, self.cache_folder, self.dtype, self.device, chunks)

    def cache(self, on_item: OnItem) -> None:
        """Makes every tensor that is not on disk yet. Says in the log which captions are cut, or read in every step."""
        for part in learning_encoders(self.config):
            log.info("%s learns: it reads the captions in every step, their embeddings are not cached", part)
        for name, words in cut_captions(
            self.base, self.entries, self.config.caption_chunks, placeholder_ids(self.config)
        ):
            log.warning("the caption of %s is too long for caption_chunks, not seen: %s", name, words)
        samples = [sample for variants in self.variants for sample in variants] + self.validation
        chunks = self.config.caption_chunks
        cache_prompts(self.base, self.prompt_files, self.device, self.dtype, chunks, on_item)
        cache_latents(self.base, samples, self.device, on_item)
        if self.config.masked_loss:
            cache_masks(samples, on_item)

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

    def batch(self, indices: Sequence[int], step: int, first_position: int, apart: int = 1) -> Batch:
        """The images of one pass; in the update's batch their positions are `apart`."""
        positions = itertools.count(first_position, apart)
        rows = [self._draw(index, step, position) for position, index in zip(positions, indices)]  # noqa: B905
        return self._stack(rows)

    def _draw(self, index: int, step: int, position: int) -> Row:
        draw = generator(self.config.seed, step, position)
        chance = torch.rand(2, generator=draw)
        sample = self.variants[index][int(chance[0] * len(self.variants[index]))]
        is_regularisation = index >= self.first_regularisation
        if chance[1] < self.config.caption_dropout and not is_regularisation:
            caption = ""
        else:
            captions = self.captions[index]
            caption = captions[pick(len(captions), self.config.seed, step, position, "caption")]
        timestep = self.noise.timestep(draw)
        latents = _latents(sample, draw)
        noise = self.noise.noise(latents, draw)
        weight = self.config.prior_weight if is_regularisation else 1.0
        return Row(sample, caption, latents, noise, self.noise.input_noise(noise, draw), timestep, weight)

    def validation_batches(self) -> Iterator[Batch]:
        """Every held-out image at fixed timesteps with fixed noise, whatever the run's seed, so that runs compare."""
        for position, sample in enumerate(self.validation):
            for timestep in VALIDATION_TIMESTEPS:
                draw = generator(0, timestep, position)
                latents = _latents(sample, draw)
                noise = torch.randn(latents.shape, generator=draw)
                yield self._stack([Row(sample, sample.entry.caption, latents, noise, noise, timestep)])

    def _stack(self, rows: Sequence[Row]) -> Batch:
        prompts = [load_prompt(self.prompt_files[row.caption]) for row in rows if self.reads_prompts]
        masks = torch.stack([row.sample.mask() for row in rows]) if self.config.masked_loss else None
        return Batch(
            latents=torch.stack([row.latents for row in rows]).to(self.device),
            noise=torch.stack([row.noise for row in rows]).to(self.device),
            input_noise=torch.stack([row.input_noise for row in rows]).to(self.device),
            timesteps=torch.tensor([row.timestep for row in rows], device=self.device),
            captions=tuple(row.caption for row in rows),
            embeds=stack_embeds([row for row, _ in prompts]).to(self.device, self.dtype) if prompts else None,
            pooled=torch.stack([row for _, row in prompts]).to(self.device, self.dtype) if prompts else None,
            time_ids=torch.stack([row.sample.time_ids() for row in rows]).to(self.device),
            weights=torch.tensor([row.weight for row in rows], device=self.device),
            masks=None if masks is None else masks.to(self.device),
        )


def _latents(sample: Sample, draw: torch.Generator) -> Tensor:
    """A fresh draw from the VAE's posterior, [4, H/8, W/8]."""
    mean, std = sample.posterior()
    return mean + std * torch.randn(mean.shape, generator=draw)


def all_trigger_words(dataset: CaptionDataset, config: TrainConfig) -> list[str]:
    """What calls for the LoRA in a prompt: the dataset's words and the new tokens."""
    return list(dict.fromkeys([*dataset.trigger_words, *tokens_of(config)]))


def require_shown(config: TrainConfig, captions: Sequence[str]) -> None:
    """Raises ValueError for a new token that none of the training captions holds."""
    for name in tokens_of(config):
        if not any(holds_word(caption, name) for caption in captions):
            raise ValueError(
                f"new_tokens names {name} and no caption holds it: give {name} as the dataset's trigger_word, or write "
                "it into the captions"
            )
