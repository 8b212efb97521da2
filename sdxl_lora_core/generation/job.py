"""The values that `generate` takes: the job and its context."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..cache.folders import CacheFolders
from ..control.control import Control
from ..lora.stack import LoRARef
from ..runtime.loaded_parts import LoadedParts
from ..sdxl.base import SDXLBase
from ..sdxl.family import Family
from .config import GenerateConfig
from .init_images import StartImage

OnStep = Callable[[int, int], object]


@dataclass(frozen=True)
class GenerationJob:
    """The images to generate: for each prompt of `config` as many as its `count`, with consecutive seeds.

    `starts` is empty, has one start for all images, or one for each in order; so have the hints of each of `controls`,
    which act on all images together. A ControlNet of strength 0 costs and changes nothing.
    """

    base: SDXLBase
    config: GenerateConfig
    loras: Sequence[LoRARef] = ()
    starts: Sequence[StartImage] = ()
    controls: Sequence[Control] = ()


@dataclass(frozen=True)
class GenerationContext:
    """The resources of a job. Nothing here affects a pixel, except the device of `parts`.

    `parts` owns the loaded weights. `cache` None neither reads nor stores anything. `graph` is ComfyUI's `prompt` and
    `workflow`, with which PNGs record how they were made (see png_metadata). `find_embedding` returns the file of
    `embedding:name`, None if there is none. `on_step(done, total)` counts UNet calls and may raise to cancel.
    `on_detail` gets the image and its step in words, before the on_step that reports it.
    `on_estimate(latents, family)` gets an estimate of the clean latents before each step, float32 [B, 4, H/8, W/8]
    in the scale of the UNet of that family.
    """

    parts: LoadedParts
    cache: CacheFolders | None = None
    graph: Mapping[str, Any] | None = None
    find_embedding: Callable[[str], Path | None] = lambda name: None
    on_step: OnStep = lambda done, total: None
    on_detail: Callable[[str], None] = lambda words: None
    on_estimate: Callable[[Tensor, Family], object] | None = None

    @property
    def hash_memo(self) -> Path | None:
        """The folder that remembers the hashes of large files."""
        return self.cache.hashes if self.cache else None
