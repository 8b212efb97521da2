"""What the tests of generation share: small requests, an owner of weights that keeps a record, random LoRAs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from sdxl_lora_core.cache.folders import CacheFolders
from sdxl_lora_core.generation.config import GenerateConfig
from sdxl_lora_core.generation.generate import generate
from sdxl_lora_core.generation.job import GenerationContext, GenerationJob
from sdxl_lora_core.generation.passes import GeneratedImage
from sdxl_lora_core.lora.stack import LoRARef
from sdxl_lora_core.runtime.loaded_parts import Loaded, LoadedParts, PartRequest
from sdxl_lora_core.sdxl.base import SDXLBase, load_part

CPU = torch.device("cpu")
TRAINED = {"unet": ("to_q", "to_v"), "text_encoder": ("q_proj", "fc1"), "text_encoder_2": ("q_proj", "fc1")}
SHARED = LoadedParts(CPU)  # loading takes longer than drawing; the tests of loading have owners of their own


class WatchedParts(LoadedParts):
    """Keeps a record of what the owner did, and can break a part's weights when it arrives."""

    def __init__(self, offload: bool = False, broken: str | None = None) -> None:
        super().__init__(CPU, offload)
        self.events: list[str] = []
        self.rooms: dict[str, int] = {}
        self.broken = broken

    def borrow(self, request: PartRequest) -> Loaded:
        def load() -> Loaded:
            self.events.append(f"load {request.name}")
            return request.load()

        def change(loaded: Loaded) -> Loaded | None:
            changed = request.change(loaded)
            self.events.append(f"{'replace' if changed is None else 'change'} {request.name}")
            return changed

        return super().borrow(dataclasses.replace(request, load=load, change=change))

    def to_device(self, name: str, module: nn.Module, room: int = 0) -> None:
        self.events.append(f"arrive {name}")
        self.rooms[name] = room
        if name == self.broken:
            for weight in module.parameters():
                weight.fill_(torch.nan)
        super().to_device(name, module, room)

    def to_cpu(self, name: str, module: nn.Module) -> None:
        self.events.append(f"leave {name}")
        super().to_cpu(name, module)

    def taken_events(self, kind: str = "") -> list[str]:
        taken = [event for event in self.events if event.startswith(kind)]
        self.events.clear()
        return taken

    def held(self, part: str) -> Any:
        return held(self, part)


def held(parts: LoadedParts, name: str) -> Any:
    """The module that the owner holds."""
    return parts._held[name][1].module


def settings(**changes: Any) -> GenerateConfig:
    return GenerateConfig(**{"prompt": "a red circle", "width": 64, "height": 64, "steps": 3, "seed": 5, **changes})


class SomeFolders(SimpleNamespace):
    """In place of CacheFolders, with some folders only: without prompts and hashes every run computes them."""

    images: Path | None
    prompts: Path | None
    hashes: Path | None


def draw(base: SDXLBase, config: GenerateConfig, loras: Sequence[LoRARef] = (), **options: Any) -> list[GeneratedImage]:
    """generate with the shared owner, unless `options`, fields of the job and the context, say otherwise.

    It caches images in `cache_folder`, hashes in `hash_memo` and prompts below `prompt_cache`, where they are given.
    """
    images, hashes, prompts = (options.pop(name, None) for name in ("cache_folder", "hash_memo", "prompt_cache"))
    if images or hashes or prompts:
        folder = CacheFolders(prompts).prompts if prompts else None
        options["cache"] = SomeFolders(images=images, prompts=folder, hashes=hashes)
    if not images and config.cache != "only":
        config = dataclasses.replace(config, cache="off")
    more = {name: options.pop(name) for name in ("starts", "controls") if name in options}
    return generate(GenerationJob(base, config, loras, **more), GenerationContext(**{"parts": SHARED, **options}))


def pixels(base: SDXLBase, config: GenerateConfig, loras: Sequence[LoRARef] = (), **options: Any) -> np.ndarray:
    """What `draw` gives, [N, H, W, 3] as int, so that differences can be negative."""
    return np.stack([image.pixels for image in draw(base, config, loras, **options)]).astype(int)


def cancel_at(step: int) -> Callable[[int, int], None]:
    """An on_step that breaks off there."""

    def on_step(done: int, total: int) -> None:
        if done == step:
            raise KeyboardInterrupt

    return on_step


def hits(images: list[GeneratedImage]) -> list[bool]:
    return [image.hit for image in images]


def write_lora(path: Path, base: SDXLBase, seed: int, trained: dict[str, tuple[str, ...]] = TRAINED) -> LoRARef:
    """A strong random LoRA in the spelling that diffusers itself writes."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for part, names in trained.items():
        for name, module in load_part(base, part, torch.float32).named_modules():  # type: ignore[arg-type]
            if isinstance(module, nn.Linear) and name.endswith(names):
                inside = f"text_model.{name}" if part != "unet" and not name.startswith("text_model.") else name
                tensors[f"{part}.{inside}.lora_A.weight"] = torch.randn(4, module.in_features, generator=draw) * 0.3
                tensors[f"{part}.{inside}.lora_B.weight"] = torch.randn(module.out_features, 4, generator=draw) * 0.3
    save_file(tensors, path)
    return LoRARef(path, path.stem, 1.0, 1.0)


def weighted(lora: LoRARef, model: float, clip: float) -> LoRARef:
    return LoRARef(lora.path, lora.name, model, clip)


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
