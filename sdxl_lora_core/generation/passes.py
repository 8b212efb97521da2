"""One pass of a request: which of its images are in the cache, and making those that are not."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..cache.image_cache import ImageCache
from ..control.control import HintNumbers
from ..text.embedding_files import EmbeddingFile
from ..text.text_model import TextEmbeds
from .config import GenerateConfig
from .guidance import is_guided
from .image_keys import KEYED_LIBRARIES, image_facts, key_of, start_settings
from .image_maker import ImageBatch, ImageMaker
from .init_images import EncodedStart, StartImage, enlarged
from .prompt_encoder import TextPhase
from .samplers import SOLVERS, require_libraries

OnStep = Callable[[int, int], None]
READERS = 4  # images read from the cache at a time; most of a reading is unpacking, which leaves Python to others


@dataclass(frozen=True)
class GeneratedImage:
    """`pixels` are uint8 [H, W, 3]; `hit`: they were in the cache; `seconds` is what making or reading took.

    `words` are those of the prompt in one line, without the syntax.

    `texts` are the text chunks for a PNG of it, by keyword. `latents` are float32 [4, H/8, W/8] in the VAE's own scale,
    where the request keeps them.
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


@dataclass(frozen=True)
class Request:
    prompt: str
    seed: int
    embeddings: tuple[EmbeddingFile, ...]
    words: str
    key: str
    facts: dict[str, Any] = field(compare=False)  # all that the key is made of
    start: StartImage | None = field(compare=False)
    hints: HintNumbers = field(compare=False)
    first: Request | None = field(default=None, compare=False)  # the one for the image that this one enlarges
    seconds: float = field(default=0.0, compare=False)  # that were spent on it before

    @property
    def starts(self) -> tuple[StartImage, ...]:
        return () if self.start is None else (self.start,)


class Count:
    """The UNet's calls of both passes as one count. `before` were made in another pass, `ahead` are to follow."""

    def __init__(self, on_step: OnStep) -> None:
        self._on_step = on_step
        self.before = self.ahead = 0

    def __call__(self, done: int, total: int) -> None:
        self._on_step(self.before + done, self.before + total + self.ahead)


class _Ingredients(NamedTuple):
    """What images are made of, encoded once for all that share it."""

    texts: dict[str, TextEmbeds]
    starts: dict[StartImage, EncodedStart]


@dataclass(frozen=True)
class Pass:
    """One pass of a call of `generate`: what its images share."""

    config: GenerateConfig
    settings: dict[str, Any]
    cache: ImageCache | None
    text_phase: TextPhase
    maker: ImageMaker
    texts: Callable[[str, int, Sequence[EmbeddingFile]], dict[str, str]]
    steering: Callable[[HintNumbers], dict[str, Any]]
    count: Count

    @property
    def calls(self) -> int:
        """Of the UNet, for each image."""
        return SOLVERS[self.config.sampler].unet_calls(self.config.steps)

    def facts(
        self,
        prompt: str,
        seed: int,
        embeddings: Sequence[EmbeddingFile],
        start: Mapping[str, Any] | None,
        hints: HintNumbers,
    ) -> dict[str, Any]:
        pictures = {**start_settings(self.config, start), **self.steering(hints)}
        return image_facts(self.settings, prompt, seed, [file.sha256 for file in embeddings], pictures)

    def images(
        self, requests: Sequence[Request], started: Callable[[Sequence[Request]], Sequence[Request]] = lambda _: _
    ) -> list[GeneratedImage]:
        """`started` gives those that have to be made what they start from, where that has to be made as well."""
        images = self.find(requests)
        missing = [request for request in dict.fromkeys(requests) if request.key not in images]
        if missing and self.config.cache == "only":
            raise ValueError(_not_cached(missing, len(images)))
        images |= self.make(started(missing))
        return [images[request.key] for request in requests]

    def after(self, first: Request) -> Request:
        """The request that enlarges what `first` asks for. Its start is known by the key, before there is one."""
        facts = self.facts(first.prompt, first.seed, first.embeddings, {"first_pass": first.key}, first.hints)
        return replace(first, key=key_of(facts), facts=facts, start=None, first=first)

    def starting_from(self, first: Pass, missing: Sequence[Request]) -> list[Request]:
        before = [request.first for request in missing if request.first]
        self.count.ahead = self.calls * len(missing)
        images = first.images(before)
        self.count.before, self.count.ahead = first.calls * sum(not image.hit for image in images), 0
        return [
            replace(request, start=enlarged(image.pixels, wanted.start, self.config), seconds=image.seconds)
            for request, wanted, image in zip(missing, before, images, strict=True)
        ]

    def find(self, requests: Sequence[Request]) -> dict[str, GeneratedImage]:
        if self.cache is None or self.config.cache == "refresh":
            return {}
        once = list(dict.fromkeys(requests))
        with ThreadPoolExecutor(READERS) as readers:
            found = readers.map(functools.partial(self._read, self.cache), once)
            return {image.key: image for image in found if image}

    def _read(self, cache: ImageCache, request: Request) -> GeneratedImage | None:
        start = time.perf_counter()
        pixels = cache.load(request.key)
        latents = cache.load_latents(request.key) if self.config.keep_latents else None
        if pixels is None or (latents is None and self.config.keep_latents):
            return None
        return self._image(request, pixels, latents, True, time.perf_counter() - start)

    def make(self, missing: Sequence[Request]) -> dict[str, GeneratedImage]:
        if not missing:
            return {}
        require_libraries(self.config.sampler, self.config.scheduler)
        images: dict[str, GeneratedImage] = {}
        steps, size = self.calls, self.config.batch_size
        ingredients = functools.cache(lambda: self._ingredients(missing))
        self.count(0, steps * len(missing))
        # In ComfyUI's inference mode every tensor made here, weights among them, would be unfit for training.
        with torch.inference_mode(False), torch.no_grad():
            for first in range(0, len(missing), size):
                report = functools.partial(self._report, steps * first, steps * len(missing))
                images |= self._make_batch(missing[first : first + size], ingredients, report)
        return images

    def _make_batch(
        self, batch: Sequence[Request], ingredients: Callable[[], _Ingredients], report: Callable[[int], None]
    ) -> dict[str, GeneratedImage]:
        keys = [request.key for request in batch]
        with self.cache.locked(keys, waiting=lambda: report(0)) if self.cache else nullcontext():
            images = self.find(batch)  # somebody may have made them while this process waited
            left = [request for request in batch if request.key not in images]
            return images | self._make_now(left, ingredients(), report) if left else images

    def _make_now(
        self, batch: Sequence[Request], ingredients: _Ingredients, report: Callable[[int], None]
    ) -> dict[str, GeneratedImage]:
        start = time.perf_counter()
        inputs = ImageBatch(
            prompts=[ingredients.texts[request.prompt] for request in batch],
            negative=ingredients.texts[self.config.negative_prompt] if is_guided(self.config) else None,
            seeds=[request.seed for request in batch],
            starts=[ingredients.starts[start] for request in batch for start in request.starts],
            hints=[request.hints for request in batch],
        )
        made = self.maker.make(inputs, lambda steps: report(steps * len(batch)))
        seconds = (time.perf_counter() - start) / len(batch)
        images = {}
        for request, (pixels, latents) in zip(batch, made, strict=True):
            kept = latents if self.config.keep_latents else None
            image = images[request.key] = self._image(request, pixels, kept, False, request.seconds + seconds)
            if self.cache:
                self.cache.store(image.key, pixels, self._manifest(request), image.texts, kept)
        return images

    def _ingredients(self, requests: Sequence[Request]) -> _Ingredients:
        starts = dict.fromkeys(start for request in requests for start in request.starts)
        return _Ingredients(self.text_phase.encode(self._texts(requests)), self.maker.encode(starts) if starts else {})

    def _texts(self, requests: Sequence[Request]) -> list[str]:
        texts = [request.prompt for request in requests]
        return [*texts, self.config.negative_prompt] if is_guided(self.config) else texts

    def _report(self, before: int, total: int, steps: int) -> None:
        self.count(before + steps, total)

    def _image(
        self, request: Request, pixels: np.ndarray, latents: Tensor | None, hit: bool, seconds: float
    ) -> GeneratedImage:
        texts = self.texts(request.prompt, request.seed, request.embeddings)
        return GeneratedImage(
            pixels, request.prompt, request.seed, request.key, hit, seconds, texts, request.words, latents
        )

    def _manifest(self, request: Request) -> dict[str, Any]:
        return {
            "settings": request.facts,
            "versions": {name: version(name) for name in KEYED_LIBRARIES},
        }


def _not_cached(missing: Sequence[Request], found: int) -> str:
    names = "; ".join(f"{request.prompt!r} with seed {request.seed}" for request in missing[:3])
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return (
        f"cache is 'only' and {len(missing)} of {len(missing) + found} images are not in the cache: {names}{more}; "
        "set cache to 'use' to make them"
    )
