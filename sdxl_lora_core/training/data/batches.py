"""The batches of each optimizer update: latents, noise, timesteps and prompt embeddings.

Everything random is a function of (seed, step, position in the effective batch); the order of images is a function of
(seed, epoch). The global random state is neither used nor changed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...cache.folders import CacheFolders
from ...cache.kept_tensors import KeptTensors
from ...cache.tensor_cache import OnItem
from ...dataset.caption_dataset import CaptionEntry
from ...dataset.caption_text import contains_word
from ...hashed_random import generator, random_index
from ...images.crop import Crop
from ...sdxl.family import ENCODERS
from ...text.encoding import stack_embeds
from ...text.prompt_cache import PromptKeys, cache_prompts, load_prompt
from ..config.captions import placeholder_ids, tokens_of
from ..config.train_config import TrainConfig, learning_encoders
from ..job import TrainingJob
from .caption_variants import caption_variants, truncated_captions
from .latent_cache import Sample, cache_latents, cache_masks, make_sample
from .noise import NoiseSampler

log = logging.getLogger("sdxl_lora")

VALIDATION_TIMESTEPS = (100, 300, 500, 700, 900)
IMAGE_TIMESTEPS = (300, 500, 700)  # where captions matter most
_FORWARDS = 3 * len(IMAGE_TIMESTEPS)  # of an image: with and without its caption before training, with it after


@dataclass(frozen=True)
class Batch:
    """Tensors of one forward pass. latents, noise and input_noise are float32 [B, 4, H/8, W/8].

    The UNet sees latents with input_noise and predicts noise. embeds [B, T, C] and pooled [B, P] are those of the
    captions, None if both text encoders are trained. weights [B] are loss weights; masks are float32 [B, 1, H/8, W/8],
    1 where the image is trained, or None.
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

    def to(self, device: torch.device) -> Batch:
        """The batch on the device; copies from pinned memory overlap with computation."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The batch in page-locked memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **values)


@dataclass(frozen=True)
class Row:
    """One sample of a batch."""

    sample: Sample
    caption: str
    latents: Tensor
    noise: Tensor
    input_noise: Tensor
    timestep: int
    weight: float = 1.0


class PassOfUpdate(NamedTuple):
    """A forward pass of an update: the images, and their positions in the update's batch.

    The positions are `first`, `first + apart` and so on.
    """

    step: int
    indices: tuple[int, ...]
    first: int = 0
    apart: int = 1


class TrainingData:
    """The samples of a job with their captions, by step and position. All tensors are on the CPU.

    `captions` are the texts that each image is trained with; `prompt_files` hold the embeddings of all of them. There
    are none if both text encoders are trained. `kept` are the tensors that stay in main memory.
    """

    def __init__(self, job: TrainingJob, cache: CacheFolders, device: torch.device) -> None:
        """`device` is where embeddings and latents are computed. Raises ValueError if masked_loss finds no mask."""
        config, dataset = job.config, job.dataset
        self.job, self.config, self.folders, self.device, self.dtype = job, config, cache, device, job.dtype(device)
        if config.masked_loss and not any(entry.mask for entry in job.entries):
            raise ValueError(
                f"masked_loss is on and no image of {dataset.name} has a mask or an alpha channel: "
                "put masks/<name>.png into the folder, or turn masked_loss off"
            )
        self.noise = NoiseSampler(config)
        self.variants = [self._variants(entry) for entry in job.entries]
        self.captions = [self._captions(entry, job.trigger_words) for entry in dataset.entries]
        self.captions += [entry.captions for entry in dataset.regularisation]
        self.first_regularisation = len(dataset.entries)
        self.validation = [self._sample(entry, entry.center, mirrored=False) for entry in dataset.validation]
        self.reads_prompts = len(learning_encoders(config)) < len(ENCODERS)
        self.prompt_keys = PromptKeys(job.base, self.dtype, device, config.caption_chunks)
        captions = self._all_captions() if self.reads_prompts else ()
        self.prompt_files = {caption: self.prompt_keys.file(cache.prompts, caption) for caption in captions}
        self.kept = KeptTensors()
        self._epochs: dict[int, list[list[int]]] = {}
        self._per_epoch = len(self._epoch(0))

    def _variants(self, entry: CaptionEntry) -> list[Sample]:
        orientations = (False, True) if entry.flip else (False,)
        return [self._sample(entry, crop, mirrored) for crop in entry.crops for mirrored in orientations]

    def _sample(self, entry: CaptionEntry, crop: Crop, mirrored: bool) -> Sample:
        return make_sample(self.job.base, entry, crop, mirrored, self.folders.latents)

    def _captions(self, entry: CaptionEntry, trigger_words: Sequence[str]) -> tuple[str, ...]:
        return caption_variants(entry.captions, entry.sha256, trigger_words, self.config)

    def _all_captions(self) -> list[str]:
        shown = [caption for captions in self.captions for caption in captions]
        shown += [sample.entry.caption for sample in self.validation]
        return [*shown, ""] if self.config.caption_dropout > 0 or self.measures_images else shown

    @property
    def measures_images(self) -> bool:
        """Whether the loss of each image is measured. `auto`: if that is a tenth of the training or less.

        A step takes about three forward passes for each of its images.
        """
        if self.config.image_losses != "auto":
            return self.config.image_losses == "on"
        seen = self.config.steps * self.config.batch_size * self.config.gradient_accumulation
        return _FORWARDS * self.first_regularisation <= 0.1 * 3 * seen

    def cache(self, on_item: OnItem) -> None:
        """Computes every tensor that is not on disk yet. Logs the captions that are truncated, or not cached."""
        for part in learning_encoders(self.config):
            log.info("%s is trained: it reads the captions in every step, their embeddings are not cached", part)
        chunks, tokens = self.config.caption_chunks, placeholder_ids(self.config)
        for name, words in truncated_captions(self.job.base, self.job.entries, chunks, tokens):
            log.warning("the caption of %s is too long for caption_chunks and truncated: %s", name, words)
        if note := small_batches(self.job):
            log.warning(note)
        samples = [sample for variants in self.variants for sample in variants] + self.validation
        cache_prompts(self.prompt_keys, self.prompt_files, on_item)
        cache_latents(self.job.base, samples, self.device, self.folders.hashes, on_item)
        if self.config.masked_loss:
            cache_masks(samples, self.folders.hashes, on_item)

    def micro_batches(self, step: int) -> list[list[int]]:
        """The image indices of each batch of an optimizer update."""
        first = step * self.config.gradient_accumulation
        numbers = range(first, first + self.config.gradient_accumulation)
        return [self._epoch(number // self._per_epoch)[number % self._per_epoch] for number in numbers]

    def _epoch(self, epoch: int) -> list[list[int]]:
        if epoch not in self._epochs:
            self._epochs = {epoch: self.job.epoch_batches(epoch)}
        return self._epochs[epoch]

    def batch(self, chosen: PassOfUpdate) -> Batch:
        """The batch of a pass. Depends on its arguments only, and may be called in another thread."""
        positions = range(chosen.first, chosen.first + chosen.apart * len(chosen.indices), chosen.apart)
        return self._stack(
            [self._row(index, chosen.step, at) for index, at in zip(chosen.indices, positions, strict=True)]
        )

    def _row(self, index: int, step: int, position: int) -> Row:
        random = generator(self.config.seed, step, position)
        chance = torch.rand(2, generator=random)
        sample = self.variants[index][int(chance[0] * len(self.variants[index]))]
        is_regularisation = index >= self.first_regularisation
        if chance[1] < self.config.caption_dropout and not is_regularisation:
            caption = ""
        else:
            captions = self.captions[index]
            caption = captions[random_index(len(captions), self.config.seed, step, position, "caption")]
        timestep = self.noise.timestep(random)
        latents = self._latents(sample, random)
        noise = self.noise.noise(latents, random)
        weight = self.config.prior_weight if is_regularisation else 1.0
        return Row(sample, caption, latents, noise, self.noise.input_noise(noise, random), timestep, weight)

    def validation_batches(self) -> Iterator[Batch]:
        """Every held-out image at fixed timesteps with fixed noise, whatever the run's seed, so that runs compare."""
        for position, sample in enumerate(self.validation):
            for timestep in VALIDATION_TIMESTEPS:
                random = generator(0, timestep, position)
                latents = self._latents(sample, random)
                noise = torch.randn(latents.shape, generator=random)
                yield self._stack([Row(sample, sample.entry.caption, latents, noise, noise, timestep)])

    def image_batches(self, with_captions: bool) -> Iterator[Batch]:
        """Every training image at fixed timesteps, with the same noise for all images, so that images compare."""
        for variants, captions in zip(self.variants[: self.first_regularisation], self.captions, strict=False):
            for timestep in IMAGE_TIMESTEPS:
                random = generator(0, timestep, 0)
                latents = self._latents(variants[0], random)
                noise = torch.randn(latents.shape, generator=random)
                caption = captions[0] if with_captions else ""
                yield self._stack([Row(variants[0], caption, latents, noise, noise, timestep)])

    def _latents(self, sample: Sample, random: torch.Generator) -> Tensor:
        """A sample of the VAE's posterior, [4, H/8, W/8]."""
        mean, std = sample.posterior(self.kept.load)
        return mean + std * torch.randn(mean.shape, generator=random)

    def _stack(self, rows: Sequence[Row]) -> Batch:
        prompts = [load_prompt(self.prompt_files[row.caption], self.kept.load) for row in rows if self.reads_prompts]
        return Batch(
            latents=torch.stack([row.latents for row in rows]),
            noise=torch.stack([row.noise for row in rows]),
            input_noise=torch.stack([row.input_noise for row in rows]),
            timesteps=torch.tensor([row.timestep for row in rows]),
            captions=tuple(row.caption for row in rows),
            embeds=stack_embeds([row for row, _ in prompts]).to(self.dtype) if prompts else None,
            pooled=torch.stack([row for _, row in prompts]).to(self.dtype) if prompts else None,
            time_ids=torch.stack([row.sample.time_ids() for row in rows]),
            weights=torch.tensor([row.weight for row in rows]),
            masks=torch.stack([row.sample.mask(self.kept.load) for row in rows]) if self.config.masked_loss else None,
        )


def small_batches(job: TrainingJob) -> str | None:
    """A note if the mean batch of an epoch has less than three quarters of `batch_size`."""
    sizes = [len(batch) for batch in job.epoch_batches(0)]
    mean, wanted = sum(sizes) / len(sizes), job.config.batch_size
    if mean >= 0.75 * wanted:
        return None
    return (
        f"batch_size is {wanted}, but the mean batch has {mean:.1f} images, because images of different buckets cannot "
        "share one and many buckets have few: lower batch_size, or crop the images to fewer aspect ratios"
    )


def require_new_tokens(config: TrainConfig, captions: Sequence[str]) -> None:
    """Raises ValueError for a new token that none of the captions contains."""
    for name in tokens_of(config):
        if not any(contains_word(caption, name) for caption in captions):
            raise ValueError(
                f"new_tokens names {name} and no caption contains it: set {name} as the dataset's trigger_word, or "
                "write it into the captions"
            )
