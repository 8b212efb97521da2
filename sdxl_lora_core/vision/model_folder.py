"""Opens a local transformers folder: its config, weights in safetensors, and image processor. Downloads nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..files import file_sha256, json_sha256
from ..messages import brief, shown
from ..runtime.library_logs import quiet_libraries

OnImages = Callable[[int, int], object]

_IMAGES_AT_ONCE = 8
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # mean and deviation, as most vision models expect
_HALF = [0.5, 0.5, 0.5]


def read_config(folder: Path, wanted: str) -> dict[str, Any]:
    """The model's config.json. Raises FileNotFoundError or ValueError naming what the folder lacks; opens no weights.

    `wanted` says in the message what to use instead.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder.name!r} has no config.json: {wanted}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder.name}/config.json is not a JSON object: {wanted}") from error
    return config


def require_weights(folder: Path, wanted: str) -> None:
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise FileNotFoundError(f"{folder.name!r} has no model.safetensors (other formats are not opened): {wanted}")


def load_weights(
    folder: Path, kind: Any, unused: Collection[str] = (), dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """The model of transformers' class `kind` in `dtype`, eval mode, on the CPU.

    `unused` are beginnings of the names of weights that may be missing. Raises ValueError if the weights are damaged or
    others are missing.
    """
    from safetensors import SafetensorError

    try:
        with (
            quiet_libraries(),
            torch.random.fork_rng(devices=[]),
        ):  # transformers 4 initializes weights first
            loaded: Any = kind.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=dtype
            )
    except (OSError, RuntimeError, ValueError, ImportError, SafetensorError) as error:
        raise ValueError(f"the model in {folder.name!r} cannot be loaded: {brief(error)}") from error
    model, report = loaded
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(tuple(unused)))
    if missing:
        raise ValueError(
            f"the model in {folder.name!r} lacks {len(missing)} weights, as {missing[0]}: copy the whole model"
        )
    return model.to(dtype).eval().requires_grad_(False)


def load_processor(folder: Path, model: Any) -> Any:
    """The image processor based on Pillow: results must not depend on whether torchvision is installed.

    Without a processor's file: CLIP's for CLIP, else ImageNet's mean and deviation at the model's own size. Raises
    ValueError for a kind of processor that is unknown or needs a library that is not installed.
    """
    import transformers

    found = next((folder / name for name in _PROCESSORS if (folder / name).is_file()), None)
    if found is None:
        return _default_processor(model)
    settings = json.loads(found.read_text(encoding="utf-8"))
    settings = settings.get("image_processor", settings)  # nested in the processor_config.json of some models
    name = settings.get("image_processor_type") or settings.get("feature_extractor_type") or "CLIPImageProcessor"
    name = str(name).removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
    # In transformers 4 the one based on Pillow has the plain name.
    kind = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name, None)
    if kind is None:
        raise ValueError(f"{folder.name}/{found.name} names the processor {shown(name)}, which transformers lacks")
    try:
        return kind.from_pretrained(str(folder), local_files_only=True)
    except ImportError as error:
        raise ValueError(f"the image processor of {folder.name!r} cannot be used: {brief(error)}") from error


def _default_processor(model: Any) -> Any:
    import transformers

    kind: Any = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    side = getattr(model.config, "vision_config", model.config).image_size
    side = side if isinstance(side, int) else min(side)
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    name = model.config.model_type
    if name.startswith("clip"):
        return kind(**sizes)
    mean, deviation = (_HALF, _HALF) if name.startswith("siglip") else _IMAGENET
    return kind(**sizes, image_mean=mean, image_std=deviation)


def by_batches(
    model: Any,
    processor: Any,
    images: Sequence[np.ndarray],
    compute: Callable[[Tensor], Tensor],
    on_images: OnImages,
) -> Tensor:
    """What `compute` makes of the model's inputs [B, 3, h, w], for all images: float32 [N, ...] on the CPU.

    `on_images(done, total)` is called after each batch, and may raise to cancel.
    """
    rows: list[Tensor] = []
    for pixels in batches(model, processor, images):
        rows += compute(pixels).float().cpu()
        on_images(len(rows), len(images))
    return torch.stack(rows)


def batches(model: Any, processor: Any, images: Sequence[np.ndarray]) -> Iterator[Tensor]:
    """The images (uint8 [H, W, 3]) as the model's inputs, float32 [B, 3, h, w] on its device.

    Few images at a time, so that a lazy sequence is never in memory as a whole.
    """
    for start in range(0, len(images), _IMAGES_AT_ONCE):
        numbers = range(start, min(start + _IMAGES_AT_ONCE, len(images)))
        batch = [Image.fromarray(images[number]) for number in numbers]
        yield processor(images=batch, return_tensors="pt")["pixel_values"].to(model.device)


def folder_fingerprint(folder: Path) -> str:
    """A hash of the content of the model's files, independent of the folder's name."""
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors", ".txt"))
    return json_sha256([[file.name, file_sha256(file)] for file in files])
