"""What the tests of generation share: small requests, an owner of weights that keeps a record, random LoRAs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from sdxl_lora_core.generation.config import GenerateConfig
from sdxl_lora_core.generation.generate import generate
from sdxl_lora_core.generation.passes import GeneratedImage
from sdxl_lora_core.lora.stack import LoRARef
from sdxl_lora_core.runtime.loaded_parts import Change, LoadedParts
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

    def borrow(
        self, part: str, key: str, load: Callable[[], nn.Module], change: Change = lambda _: False, room: int = 0
    ) -> nn.Module:
        def loading() -> nn.Module:
            self.events.append(f"load {part}")
            return load()

        def changing(module: nn.Module) -> bool:
            changed = change(module)
            self.events.append(f"{'change' if changed else 'replace'} {part}")
            return changed

        return super().borrow(part, key, loading, changing, room)

    def arrive(self, part: str, module: nn.Module, room: int = 0) -> None:
        self.events.append(f"arrive {part}")
        self.rooms[part] = room
        if part == self.broken:
            for weight in module.parameters():
                weight.fill_(torch.nan)
        super().arrive(part, module, room)

    def leave(self, part: str, module: nn.Module) -> None:
        self.events.append(f"leave {part}")
        super().leave(part, module)

    def taken_events(self, kind: str = "") -> list[str]:
        taken = [event for event in self.events if event.startswith(kind)]
        self.events.clear()
        return taken

    def held(self, part: str) -> Any:
        return self._held[part][1]


def settings(**changes: Any) -> GenerateConfig:
    return GenerateConfig(**{"prompt": "a red circle", "width": 64, "height": 64, "steps": 3, "seed": 5, **changes})


def draw(base: SDXLBase, config: GenerateConfig, loras: Sequence[LoRARef] = (), **options: Any) -> list[GeneratedImage]:
    """generate, without a cache and with the shared owner unless `options` say otherwise."""
    return generate(base, config, loras, **{"parts": SHARED, "cache_folder": None, **options})


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
