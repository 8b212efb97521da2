"""Classifiers and taggers of images in transformers' format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .model_folder import OnImages, by_batches, load_weights, read_config, require_weights

_WANTED = (
    "use a folder with an image classifier of transformers (config.json with id2label, model.safetensors, "
    "preprocessor_config.json)"
)


def load_classifier(folder: Path) -> torch.nn.Module:
    """The classifier of a local transformers folder, float32, eval mode, on the CPU.

    Reads safetensors only and downloads nothing. Raises FileNotFoundError or ValueError naming what is missing.
    """
    from transformers import AutoModelForImageClassification

    require_classifier_folder(folder)
    return load_weights(folder, AutoModelForImageClassification)


def require_classifier_folder(folder: Path) -> None:
    """Raises FileNotFoundError or ValueError naming what a folder of a classifier lacks. Opens no weights."""
    config = read_config(folder, _WANTED)
    if "id2label" not in config and "ImageClassification" not in str(config.get("architectures")):
        raise ValueError(f"{folder.name!r} contains no classifier (its config.json has no id2label): {_WANTED}")
    require_weights(folder, _WANTED)


def labels_of(model: Any) -> list[str]:
    """The names of the classes, in the order of the logits."""
    names = model.config.id2label
    return [str(names[number]) for number in range(len(names))]


def class_logits(
    model: Any, processor: Any, images: Sequence[np.ndarray], on_images: OnImages = lambda done, total: None
) -> Tensor:
    """The logits of images (uint8 [H, W, 3]), float32 [N, classes] on the CPU.

    `on_images(done, total)` is called after each batch, and may raise to cancel.
    """
    with torch.inference_mode():
        return by_batches(model, processor, images, lambda pixels: model(pixel_values=pixels).logits, on_images)
