"""Feature vectors of images, by any image model of transformers: DINO, DINOv2, ViT, CLIP, SigLIP, a CNN."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..messages import shown
from .image_text import KINDS, projected
from .model_folder import OnImages, by_batches, load_weights, read_config, require_weights

_WANTED = "use a folder with an image model of transformers (config.json, model.safetensors, preprocessor_config.json)"


def load_encoder(folder: Path) -> torch.nn.Module:
    """The image model of a local transformers folder, float32, eval mode, on the CPU.

    Reads safetensors only and downloads nothing. Raises FileNotFoundError or ValueError naming what is missing.
    """
    from transformers import AutoModel, CLIPVisionModelWithProjection

    require_encoder_folder(folder)
    kind = read_config(folder, _WANTED).get("model_type")
    if kind == "clip_vision_model":  # of ComfyUI's clip_vision folder; AutoModel would leave the projection out
        return load_weights(folder, CLIPVisionModelWithProjection)
    return load_weights(folder, AutoModel, unused=("pooler.",))


def image_features(
    model: Any, processor: Any, images: Sequence[np.ndarray], on_images: OnImages = lambda done, total: None
) -> Tensor:
    """The features of images (uint8 [H, W, 3]), float32 [N, D] on the CPU, not normalised.

    CLIP and SigLIP: the projection to the space shared with texts. Vision transformers: the class token after the last
    norm, as DINO's k-NN evaluation uses it (arXiv:2104.14294). Others: their pooled features. `on_images(done, total)`
    is called after each batch, and may raise to cancel.
    """
    return by_batches(model, processor, images, lambda pixels: _features(model, pixels).flatten(1), on_images)


def require_encoder_folder(folder: Path) -> None:
    """Raises FileNotFoundError or ValueError naming what a folder of an image model lacks. Opens no weights."""
    from transformers import CONFIG_MAPPING

    kind = read_config(folder, _WANTED).get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"{folder.name!r} contains a model of type {shown(kind)}, unknown to transformers: {_WANTED}")
    require_weights(folder, _WANTED)


def _features(model: Any, pixels: Tensor) -> Tensor:
    if model.config.model_type in KINDS:
        return projected(model.get_image_features(pixel_values=pixels))
    found = model(pixel_values=pixels)
    if getattr(found, "image_embeds", None) is not None:
        return found.image_embeds
    tokens = found.last_hidden_state
    return tokens[:, 0] if tokens.ndim == 3 else found.pooler_output
