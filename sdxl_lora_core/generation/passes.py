"""One pass of a job: finds its images in the cache and generates the missing ones."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..cache.image_cache import ImageCache
from ..control.control import HintNumbers
from ..messages import shown
from ..text.text_model import TextEmbeds
from .config import GenerateConfig
from .guidance import is_guided
from .image_keys import KEYED_LIBRARIES, image_facts, key_of, start_settings
from .image_maker import ImageBatch, ImageMaker, MadeImage
from .init_images import EncodedStart, StartImage, enlarged
from .job import OnStep
from .png_metadata import PngTexts
from .prompt_encoder import TextPhase
from .prompt_reader import ParsedPrompt
from .samplers import SOLVERS, require_libraries

READERS = 4  # images read from the cache in parallel; decompression releases Python's lock


@dataclass(frozen=True)
class GeneratedImage:
    """`pixels` are uint8 [H, W, 3]; `hit` says that they came from the cache; `seconds` were spent on the image.

    `texts` are the text chunks of its PNG by keyword; `words` is the prompt in one line, without syntax. `latents` are
    float32 [4, H/8, W/8] in the VAE's own scale, if the request keeps them. `lora_fit` has a line for each LoRA that
    was merged for this image, now or when it was cached: how many of its modules the base has.
    """

    pixels: np.ndarray
    prompt: str
    seed: int
    key: str
    hit: bool
    seconds: float
    texts: Mapping[str, str]
    words: str
    latents: Tensor | None = None
    lora_fit: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """One image of a pass.

    `facts` are everything that its `key` is made of, `first` is the request for the image that it enlarges, and
    `seconds` were spent on that one.
    """

    prompt: ParsedPrompt = field(compare=False)
    seed: int
    key: str
    facts: dict[str, Any] = field(compare=False)
    start: StartImage | None = field(compare=False)
    hints: HintNumbers = field(compare=False)
    first: Request | None = field(default=None, compare=False)
    seconds: float = field(default=0.0, compare=False)

    @property
    def starts(self) -> tuple[StartImage, ...]:
        return () if self.start is None else (self.start,)


class Progress:
    """Counts UNet calls over all passes of a job, and the images of each pass."""

    def __init__(self, on_step: OnStep, on_detail: Callable[[str], None]) -> None:
        self._on_step, self._on_detail = on_step, on_detail
        self.done = self.total = 0
        self.images = self.all_images = 0
        self._pass = ""

    def expect(self, calls: int) -> None:
        self.total += calls

    def begin(self, name: str, images: int) -> None:
        """Begins a pass over some images. `name` stands before what is said of them."""
        self._pass = name
        self.images, self.all_images = 0, images

    def step(self, number: int, calls: int, images: int) -> None:
        """Reports UNet call `number` of `calls` for some images at once."""
        last = self.images + images
        which = f"image {last}" if images == 1 else f"images {self.images + 1} to {last}"
        self._on_detail(f"{self._pass}{which} of {self.all_images}, step {number} of {calls}")
        self.advance(images)

    def advance(self, calls: int = 0) -> None:
        """Reports `calls` more as done. The callback may raise to cancel."""
        self.done += calls
        self._on_step(self.done, self.total)


class _Ingredients(NamedTuple):
    """Inputs that several images share, encoded once."""

    prompts: dict[str, TextEmbeds]
    starts: dict[StartImage, EncodedStart]
    lora_fit: tuple[str, ...]


@dataclass(frozen=True)
class Pass:
    """One pass of a job, with what its images share. `settings` are their common part of the key."""

    config: GenerateConfig
    settings: dict[str, Any]
    negative: ParsedPrompt | None
    cache: ImageCache | None
    text_phase: TextPhase
    maker: ImageMaker
    texts: PngTexts
    control_facts: Callable[[HintNumbers], dict[str, Any]]
    progress: Progress

    @cached_property
    def calls(self) -> int:
        """UNet calls per image."""
        return SOLVERS[self.config.sampler].unet_calls(self.config.steps)

    def request(self, prompt: ParsedPrompt, seed: int, start: StartImage | None, hints: HintNumbers) -> Request:
        facts = self._facts(prompt, seed, None if start is None else start.key, hints)
        return Request(prompt, seed, key_of(facts), facts, start, hints)

    def enlarging(self, first: Request) -> Request:
        """The request that enlarges the image of `first`. Its key needs only the key of that image."""
        facts = self._facts(first.prompt, first.seed, {"first_pass": first.key}, first.hints)
        return replace(first, key=key_of(facts), facts=facts, start=None, first=first)

    def _facts(
        self, prompt: ParsedPrompt, seed: int, start: Mapping[str, Any] | None, hints: HintNumbers
    ) -> dict[str, Any]:
        negative = self.negative.embeddings if self.negative else ()
        embeddings = [file.sha256 for file in (*prompt.embeddings, *negative)]
        inputs = {**start_settings(self.config, start), **self.control_facts(hints)}
        return image_facts(self.settings, prompt.text, seed, embeddings, inputs)

    def images(
        self, requests: Sequence[Request], prepare: Callable[[Sequence[Request]], Sequence[Request]] = lambda _: _
    ) -> list[GeneratedImage]:
        """The images of the requests, in order. `prepare` completes those that must be generated."""
        images = self._find(requests)
        missing = [request for request in dict.fromkeys(requests) if request.key not in images]
        if missing and self.config.cache == "only":
            raise ValueError(_not_cached(missing, len(images)))
        self.progress.expect(self.calls * len(missing))
        images |= self._make(prepare(missing))
        return [images[request.key] for request in requests]

    def with_starts_from(self, first: Pass, missing: Sequence[Request]) -> list[Request]:
        """The requests with the images of the first pass as their starts."""
        wanted = [request.first for request in missing if request.first]
        return [
            replace(request, start=enlarged(image.pixels, before.start, self.config), seconds=image.seconds)
            for request, before, image in zip(missing, wanted, first.images(wanted), strict=True)
        ]

    def _find(self, requests: Sequence[Request]) -> dict[str, GeneratedImage]:
        if self.cache is None or self.config.cache == "refresh":
            return {}
        with ThreadPoolExecutor(READERS) as readers:
            found = readers.map(functools.partial(self._read, self.cache), dict.fromkeys(requests))
            return {image.key: image for image in found if image}

    def _read(self, cache: ImageCache, request: Request) -> GeneratedImage | None:
        start = time.perf_counter()
        pixels = cache.load(request.key)
        latents = cache.load_latents(request.key) if self.config.keep_latents else None
        if pixels is None or (latents is None and self.config.keep_latents):
            return None
        image = self._image(request, pixels, latents, hit=True, seconds=time.perf_counter() - start)
        fit = cache.manifest(request.key).get("lora_fit")  # entries before 0.4 have none
        return replace(image, lora_fit=tuple(map(str, fit)) if isinstance(fit, list) else ())

    def _make(self, missing: Sequence[Request]) -> dict[str, GeneratedImage]:
        if not missing:
            return {}
        require_libraries(self.config.sampler, self.config.scheduler)
        images: dict[str, GeneratedImage] = {}
        ingredients = functools.cache(lambda: self._ingredients(missing))
        self.progress.begin("second pass: " if missing[0].first else "", len(missing))
        self.progress.advance()
        # In ComfyUI's inference mode every tensor made here, weights included, would be unusable for training.
        with torch.inference_mode(False), torch.no_grad():
            for first in range(0, len(missing), self.config.batch_size):
                images |= self._make_batch(missing[first : first + self.config.batch_size], ingredients)
        return images

    def _make_batch(
        self, batch: Sequence[Request], ingredients: Callable[[], _Ingredients]
    ) -> dict[str, GeneratedImage]:
        keys = [request.key for request in batch]
        with self.cache.locked(keys, waiting=self.progress.advance) if self.cache else nullcontext():
            images = self._find(batch)  # another process may have generated them while this one waited
            left = [request for request in batch if request.key not in images]
            if images:
                self.progress.images += len(images)
                self.progress.advance(self.calls * len(images))
            for alike in _by_length(left, ingredients().prompts) if left else []:
                images |= self._make_now(alike, ingredients())
            return images

    def _make_now(self, batch: Sequence[Request], ingredients: _Ingredients) -> dict[str, GeneratedImage]:
        """Generates images whose prompts have one length: others would be repeated to a common multiple of theirs."""
        start = time.perf_counter()
        inputs = ImageBatch(
            prompts=[ingredients.prompts[request.prompt.text] for request in batch],
            negative=ingredients.prompts[self.negative.text] if self.negative else None,
            seeds=[request.seed for request in batch],
            starts=[ingredients.starts[start] for request in batch for start in request.starts],
            hints=[request.hints for request in batch],
        )
        made = self.maker.make(inputs, lambda number: self.progress.step(number, self.calls, len(batch)))
        self.progress.images += len(batch)
        seconds = (time.perf_counter() - start) / len(batch)
        return {
            request.key: self._stored(request, image, ingredients.lora_fit, request.seconds + seconds)
            for request, image in zip(batch, made, strict=True)
        }

    def _stored(self, request: Request, made: MadeImage, text_fit: tuple[str, ...], seconds: float) -> GeneratedImage:
        latents = made.latents if self.config.keep_latents else None
        image = self._image(request, made.pixels, latents, hit=False, seconds=seconds)
        fit = (*text_fit, *made.lora_fit)
        if self.cache:
            versions = {name: version(name) for name in KEYED_LIBRARIES}
            manifest = {"settings": request.facts, "versions": versions, **({"lora_fit": fit} if fit else {})}
            self.cache.store(image.key, made.pixels, manifest, image.texts, latents)
        return replace(image, lora_fit=fit)

    def _ingredients(self, requests: Sequence[Request]) -> _Ingredients:
        starts = dict.fromkeys(start for request in requests for start in request.starts)
        texts = [request.prompt.text for request in requests]
        embeds, fit = self.text_phase.encode([*texts, self.negative.text] if self.negative else texts)
        return _Ingredients(embeds, self.maker.encode(starts) if starts else {}, fit)

    def _image(
        self, request: Request, pixels: np.ndarray, latents: Tensor | None, *, hit: bool, seconds: float
    ) -> GeneratedImage:
        prompt = request.prompt
        negative = self.negative.embeddings if self.negative else ()
        texts = self.texts.of_image(prompt.text, request.seed, (*prompt.embeddings, *negative))
        return GeneratedImage(
            pixels, prompt.text, request.seed, request.key, hit, seconds, texts, prompt.words, latents
        )


def negative_prompt(reader: Any, config: GenerateConfig) -> ParsedPrompt | None:
    """The negative prompt; None if guidance is off and it has no effect."""
    return reader.parse(config.negative_prompt) if is_guided(config) else None


def _by_length(requests: Sequence[Request], prompts: Mapping[str, TextEmbeds]) -> Iterable[list[Request]]:
    """The requests in groups whose prompts have equal numbers of tokens, in the order of the first of each."""
    if len(requests) == 1:
        return [list(requests)]
    groups: defaultdict[int, list[Request]] = defaultdict(list)
    for request in requests:
        groups[prompts[request.prompt.text].hidden.shape[1]].append(request)
    return groups.values()


def _not_cached(missing: Sequence[Request], found: int) -> str:
    names = "; ".join(f"{shown(request.prompt.text)} with seed {request.seed}" for request in missing[:3])
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return (
        f"cache is 'only' and {len(missing)} of {len(missing) + found} images are not in the cache: {names}{more}; "
        "set cache to 'use' to generate them"
    )
