"""Generates images from an SDXL base with a stack of LoRAs, each image only once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..cache.image_cache import ImageCache
from ..control.control import Control, HintNumbers, active_controls
from ..control.control_net import require_fit
from ..lora.stack import StackEntry, open_stack
from ..sdxl.base import require_sdxl, require_vae
from ..sdxl.precision import resolve_dtype
from .config import GenerateConfig, is_own_size
from .image_keys import control_settings, image_settings
from .image_maker import ImageMaker, offload_choice
from .init_images import require_counts
from .job import GenerationContext, GenerationJob
from .passes import GeneratedImage, Pass, Progress, Request, negative_prompt
from .png_metadata import PngTexts, graph_texts
from .prompt_encoder import TextPhase
from .prompt_reader import PromptReader
from .x0_estimate import OnEstimate


def generate(job: GenerationJob, context: GenerationContext) -> list[GeneratedImage]:
    """The images of a job, ordered by prompt, then by seed.

    If every image is in the cache, no weights are loaded and diffusers is not imported. With a second pass
    (`config.hires_scale`) the image of the first pass is cached as well, and its key is part of the second one's key.
    A callback that raises cancels the job; the exception is passed on, and the images finished before it are cached.
    A cached PNG keeps the texts of the request that made it first; `texts` of an image always describes this request.

    Raises FileNotFoundError or ValueError for a LoRA or an embedding that is missing or does not fit. Raises ValueError
    for a sampler that does not fit the base or lacks its library, for a wrong number of starts or hints, for a
    ControlNet that does not fit the base, for an image that is not finite, for one that is not cached if
    `config.cache` is "only", and for a LoRA, a ControlNet or micro-conditioning with a base that is not SDXL.
    """
    require_counts(job.starts, job.config)
    require_vae(job.base)
    session = _Session(job, context)
    require_for_family(job)
    for control in session.controls:
        require_fit(control.net, job.base)
    config = job.config
    first = session.make_pass(config.first_pass, requested=config.first_pass)
    requests = _requests(first, session, hint_numbers(session.controls, config))
    if config.hires_scale == 1:
        return first.images(requests)
    second = session.make_pass(config.second_pass, requested=config)
    enlarging = [second.enlarging(request) for request in requests]
    return second.images(enlarging, functools.partial(second.with_starts_from, first))


def require_for_family(job: GenerationJob) -> None:
    """Raises ValueError for LoRAs and micro-conditioning, which only SDXL takes, if the base is not SDXL."""
    for lora in job.loras:
        if lora.strength_model or lora.strength_clip:
            require_sdxl(job.base, f"LoRA {lora.name}")
    if not is_own_size(job.config):
        require_sdxl(job.base, "micro-conditioning (original_width and so on)")


@dataclass(frozen=True)
class _Session:
    """The objects that both passes of a job share."""

    job: GenerationJob
    context: GenerationContext

    @cached_property
    def controls(self) -> tuple[Control, ...]:
        return active_controls(self.job.controls)

    @cached_property
    def stack(self) -> tuple[StackEntry, ...]:
        return open_stack(self.job.loras, self.context.hash_memo)

    @cached_property
    def reader(self) -> PromptReader:
        return PromptReader(self.job.config, self.context.find_embedding, self.context.hash_memo, self.job.base.family)

    @cached_property
    def progress(self) -> Progress:
        return Progress(self.context.on_step, self.context.on_detail)

    @cached_property
    def dtype(self) -> torch.dtype:
        return resolve_dtype(self.job.base.precision, self.context.parts.device)

    @cached_property
    def on_estimate(self) -> OnEstimate | None:
        show, family = self.context.on_estimate, self.job.base.family
        return (lambda latents: show(latents, family)) if show else None

    def make_pass(self, config: GenerateConfig, requested: GenerateConfig) -> Pass:
        """`requested` is the configuration that is written into the PNGs."""
        base, parts, cache = self.job.base, self.context.parts, self.context.cache
        graph = None if self.context.graph is None else graph_texts(self.context.graph)
        prompts, offload = cache.prompts if cache else None, offload_choice(config)
        return Pass(
            config=config,
            settings=image_settings(base, config, [lora.identity for lora in self.stack], self.dtype, parts.device),
            negative=negative_prompt(self.reader, config),
            cache=ImageCache(cache.images) if cache and config.cache != "off" else None,
            text_phase=TextPhase(self.reader, base, self.stack, parts, self.dtype, offload, prompts),
            maker=ImageMaker(base, config, self.stack, parts, self.dtype, self.controls, self.on_estimate),
            texts=PngTexts(base, requested, self.stack, graph, self.controls),
            control_facts=functools.cache(functools.partial(control_settings, config, self.controls)),
            progress=self.progress,
        )


def _requests(first: Pass, session: _Session, hints: Sequence[HintNumbers]) -> list[Request]:
    config, starts = first.config, session.job.starts
    prompts = [session.reader.parse(prompt) for prompt in config.prompts]
    images = [(prompt, (config.seed + number) % 2**64) for prompt in prompts for number in range(config.count)]
    own_starts = starts if len(starts) == len(images) else [*starts, None][:1] * len(images)
    return [
        first.request(prompt, seed, start, own_hints)
        for (prompt, seed), start, own_hints in zip(images, own_starts, hints, strict=True)
    ]


def hint_numbers(controls: Sequence[Control], config: GenerateConfig) -> list[HintNumbers]:
    """For each image, in order, the index of its hint in each control.

    Raises ValueError unless a control has one hint for all images or one for each.
    """
    images = len(config.prompts) * config.count
    for control in controls:
        if len(control.hints) not in (1, images):
            raise ValueError(
                f"ControlNet {control.net.name} has {len(control.hints)} images, but {images} images are requested "
                f"(prompts x count): give 1 for all of them, or {images}"
            )
    return [tuple(image % len(control.hints) for control in controls) for image in range(images)]
