"""The image models that the evaluating nodes use: they stay loaded between runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ..sdxl_lora_core.captioning.captioner import Loaders
from ..sdxl_lora_core.captioning.models import load_captioner
from ..sdxl_lora_core.files import stat_fingerprint
from ..sdxl_lora_core.runtime.loaded_parts import Loaded, LoadedParts, PartRequest
from ..sdxl_lora_core.sdxl.precision import resolve_dtype
from ..sdxl_lora_core.vision.classifier import load_classifier
from ..sdxl_lora_core.vision.features import load_encoder
from ..sdxl_lora_core.vision.image_text import load_clip
from . import choices

NO_MODEL = choices.NONE
_LOADERS: dict[choices.Kind, Callable[[Path], torch.nn.Module]] = {
    "clip": load_clip,
    "encoder": load_encoder,
    "classifier": load_classifier,
}


def held_model(parts: LoadedParts, kind: choices.Kind, name: str) -> tuple[Path, Callable[[Path], torch.nn.Module]]:
    """The folder of a model, and a loader that keeps it loaded between runs."""
    path = choices.find(kind, name)
    load = _LOADERS[kind]
    request = PartRequest(kind, f"{path} {stat_fingerprint(path)}", lambda: Loaded(load(path)))
    return path, lambda _: parts.borrow(request).module


def captioner_loaders(parts: LoadedParts, path: Path) -> Loaders:
    """Loaders of a captioning model or tagger that stays loaded between runs."""

    def held(kind: str, load: Callable[[Path], torch.nn.Module]) -> Callable[[Path], torch.nn.Module]:
        request = PartRequest(kind, f"{path} {stat_fingerprint(path)}", lambda: Loaded(load(path)))
        return lambda _: parts.borrow(request).module

    dtype = resolve_dtype("auto", parts.device)
    return Loaders(held("captioner", lambda folder: load_captioner(folder, dtype)), held("classifier", load_classifier))


def check_models(names: dict[choices.Kind, str | None]) -> bool | str:
    """For VALIDATE_INPUTS: True, or the first error message."""
    checks = (choices.check(kind, name) for kind, name in names.items() if name != NO_MODEL)
    return next((found for found in checks if found is not True), True)


def model_content(names: dict[choices.Kind, str | None]) -> str:
    """For IS_CHANGED: changes when the folder of one of the models does."""
    return " ".join(choices.content(kind, name) for kind, name in names.items() if name != NO_MODEL)
