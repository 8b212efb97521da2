"""Images from an SDXL base with a stack of LoRAs, each made once and alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..cache.image_cache import ImageCache
from ..control.control import Control, HintNumbers, active_controls
from ..control.control_net import require_fit
from ..lora.stack import LoRARef, open_stack
from ..runtime.loaded_parts import LoadedParts
from ..sdxl.base import SDXLBase
from ..sdxl.precision import resolve_dtype
from .config import GenerateConfig
from .guidance import is_guided
from .image_keys import control_settings, image_settings, key_of
from .image_maker import ImageMaker, offload_choice
from .init_images import StartImage, require_counts
from .passes import Count, GeneratedImage, OnStep, Pass, Request
from .png_metadata import graph_texts, image_texts
from .prompt_encoder import TextPhase
from .prompt_reader import PromptReader
from .x0_estimate import OnEstimate


def generate(
    base: SDXLBase,
    config: GenerateConfig,
    loras: Sequence[LoRARef] = (),
    *,
    starts: Sequence[StartImage] = (),
    controls: Sequence[Control] = (),
    parts: LoadedParts,
    cache_folder: Path | None,
    hash_memo: Path | None = None,
    prompt_cache: Path | None = None,
    graph: Mapping[str, Any] | None = None,
    find_embedding: Callable[[str], Path | None] = lambda name: None,
    on_step: OnStep = lambda done, total: None,
    on_estimate: OnEstimate | None = None,
) -> list[GeneratedImage]:
    """All images of the request: prompts outer, count inner, seeds seed ... seed + count - 1.

    `starts` holds nothing, one start for all images, or one for each in their order; so do the hints of `controls`,
    the ControlNets that steer all images together. One of strength 0 costs and changes nothing. Where there is a second
    pass (`config.hires_scale`), the image of the first is cached for itself, and its start is all that enters the key.
    `cache_folder` is the images/ folder (None: no cache), `hash_memo` remembers the hashes of LoRA files,
    `prompt_cache` is the folder that holds prompts/, and `find_embedding` gives the file behind `embedding:name`. If
    every image is in the cache, no weights are loaded and diffusers is not imported. Otherwise `on_step(done, total)`
    counts the UNet's calls for the missing images, one or two for a denoising step. It may raise to cancel: the
    exception passes through, and every image finished before is in the cache. `on_estimate` sees before each step what
    the images of the batch look like so far: latents, float32 [B, 4, H/8, W/8], in the scale of the UNet.

    `graph` is ComfyUI's `prompt` and `workflow`: PNGs then say how they were made (see png_metadata). A cached PNG
    goes on saying how it was made first; `texts` of an image is always about this request.

    Raises FileNotFoundError or ValueError for a LoRA or an embedding that is missing or does not fit, ValueError for a
    sampler that does not fit the base or lacks its library, for starts or hints of another number, for a ControlNet
    that does not fit the base, and for an image that is not finite, or not in the cache where `config.cache` is "only".
    """
    require_counts(starts, config)
    controls = active_controls(controls)
    for control in controls:
        require_fit(control.net, base)
    stack = open_stack(loras, hash_memo)
    dtype = resolve_dtype(base.precision, parts.device)
    hashes = [entry.identity for entry in stack]
    reader = PromptReader(config, find_embedding, hash_memo)
    cache = ImageCache(cache_folder) if cache_folder and config.cache != "off" else None
    count = Count(on_step)
    drawn_by = None if graph is None else graph_texts(graph)

    def session(one_pass: GenerateConfig, told: GenerateConfig) -> Pass:
        """`told` is what the PNG says that was asked for."""
        return Pass(
            config=one_pass,
            settings=image_settings(base, one_pass, hashes, dtype, parts.device),
            cache=cache,
            text_phase=TextPhase(reader, base, stack, parts, dtype, offload_choice(config), prompt_cache),
            maker=ImageMaker(base, one_pass, stack, parts, dtype, controls, on_estimate),
            texts=functools.partial(image_texts, base, told, stack, drawn_by, controls=controls),
            steering=functools.cache(functools.partial(control_settings, one_pass, controls)),
            count=count,
        )

    first = session(config.first_pass, config.first_pass)
    requests = _requests(first, reader, starts, hint_numbers(controls, config))
    if config.hires_scale == 1:
        return first.images(requests)
    second = session(config.second_pass, config)
    return second.images(
        [second.after(request) for request in requests], functools.partial(second.starting_from, first)
    )


def _requests(
    session: Pass, reader: PromptReader, starts: Sequence[StartImage], hints: Sequence[HintNumbers]
) -> list[Request]:
    config = session.config
    unwanted = reader.embeddings(config.negative_prompt) if is_guided(config) else ()
    wanted = [(prompt, (config.seed + number) % 2**64) for prompt in config.prompts for number in range(config.count)]
    own_starts = starts if len(starts) == len(wanted) else [*starts, None][:1] * len(wanted)
    readings = {prompt: (reader.embeddings(prompt) + unwanted, reader.words(prompt)) for prompt in config.prompts}
    requests = []
    for (prompt, seed), start, own_hints in zip(wanted, own_starts, hints, strict=True):
        embeddings, words = readings[prompt]
        facts = session.facts(prompt, seed, embeddings, None if start is None else start.key, own_hints)
        requests.append(Request(prompt, seed, embeddings, words, key_of(facts), facts, start, own_hints))
    return requests


def hint_numbers(controls: Sequence[Control], config: GenerateConfig) -> list[HintNumbers]:
    """For each image of the request, in order.

    Raises ValueError unless a control has one hint for all images or one for each.
    """
    wanted = len(config.prompts) * config.count
    for control in controls:
        if len(control.hints) not in (1, wanted):
            raise ValueError(
                f"ControlNet {control.net.name} has {len(control.hints)} images to steer by, but {wanted} images are "
                f"asked for (prompts x count): give 1 for all of them, or {wanted}"
            )
    return [tuple(image % len(control.hints) for control in controls) for image in range(wanted)]
