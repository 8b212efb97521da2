"""CLIP (arXiv:2103.00020) and SigLIP (arXiv:2303.15343) models: texts and images as unit vectors of one space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..messages import shown
from .model_folder import OnImages, by_batches, load_weights, read_config, require_weights

KINDS = ("clip", "siglip", "siglip2")
_LEGACY_EOS = 2  # in configs from before transformers 4.31: the model then pools at the highest token id
_WANTED = "use a folder with a CLIP or SigLIP model of transformers (config.json, model.safetensors, tokenizer files)"


def load_clip(folder: Path) -> torch.nn.Module:
    """The CLIP or SigLIP model of a local transformers folder, float32, eval mode, on the CPU.

    Reads safetensors only and downloads nothing. Raises FileNotFoundError or ValueError naming what is missing.
    """
    from transformers import AutoModel

    require_clip_folder(folder)
    return load_weights(folder, AutoModel)


def load_tokenizer(folder: Path, model: Any) -> Any:
    """The folder's tokenizer. Raises FileNotFoundError if there is none, ValueError if it belongs to another model."""
    from transformers import AutoTokenizer

    # Without these files transformers would silently create an empty tokenizer.
    pair = ("vocab.json", "merges.txt")
    whole = any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model", "tokenizer.model"))
    if not whole and not all((folder / name).is_file() for name in pair):
        raise FileNotFoundError(
            f"{folder.name!r} has neither tokenizer.json nor both of vocab.json and merges.txt: copy the tokenizer "
            "files to it"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except ImportError as error:
        raise ValueError(
            f"the tokenizer in {folder.name!r} needs a library that is missing: run `pip install sentencepiece "
            "protobuf`, or copy its tokenizer.json"
        ) from error
    size = model.config.text_config.vocab_size
    end, expected = tokenizer.eos_token_id, model.config.text_config.eos_token_id
    fits = end == len(tokenizer) - 1 if expected == _LEGACY_EOS else end == expected
    if len(tokenizer) > size or not (
        fits or _pads(model)
    ):  # SigLIP's configs state CLIP's end token, and do not use it
        raise ValueError(
            f"the tokenizer in {folder.name!r} ({len(tokenizer)} tokens, end token {end}) does not belong to this "
            f"model ({size} tokens, end token {expected}): copy the model's tokenizer"
        )
    return tokenizer


def embed_text(model: Any, tokenizer: Any, text: str, warnings: list[str]) -> Tensor:
    """A text as a unit vector, float32 [D] on the CPU. Adds to `warnings` what is truncated.

    Each text is encoded alone, so that it does not depend on the others; CLIP's without padding, SigLIP's padded to the
    full length, as it was trained. Truncation keeps the end token, where CLIP pools.
    """
    limit = model.config.text_config.max_position_embeddings
    whole = tokenizer(text, truncation=False, verbose=False)["input_ids"]
    padding = "max_length" if _pads(model) else False
    ids = tokenizer(text, truncation=True, max_length=limit, padding=padding)["input_ids"]
    if not text:
        warnings.append("a prompt has no text: its scores are meaningless")
    if len(whole) > limit:
        ends = len(tokenizer("")["input_ids"])  # start and end token, or the end token alone
        lost = tokenizer.decode(whole[limit - 1 : -1]).strip()
        warnings.append(f"a prompt of {len(whole) - ends} tokens was truncated to {limit - ends}; not scored: {lost!r}")
    return unit_vectors(model.get_text_features(input_ids=torch.tensor([ids], device=model.device)))[0]


def embed_images(
    model: Any, processor: Any, images: Sequence[np.ndarray], on_images: OnImages = lambda done, total: None
) -> Tensor:
    """Images (uint8 [H, W, 3]) as unit vectors, float32 [N, D] on the CPU.

    `on_images(done, total)` is called after each batch, and may raise to cancel.
    """
    return by_batches(
        model, processor, images, lambda pixels: unit_vectors(model.get_image_features(pixel_values=pixels)), on_images
    )


def require_clip_folder(folder: Path) -> None:
    """Raises FileNotFoundError or ValueError naming what a folder of a CLIP or SigLIP model lacks. Opens no weights."""
    kind = read_config(folder, _WANTED).get("model_type")
    if kind not in KINDS:
        raise ValueError(
            f"{folder.name!r} contains a model of type {shown(kind)}, not 'clip' or 'siglip' (image and text): "
            f"{_WANTED}"
        )
    require_weights(folder, _WANTED)


def unit_vectors(features: Any) -> Tensor:
    """Features as unit vectors, float32 [N, D] on the CPU."""
    tensor = projected(features).float().cpu()
    return tensor / tensor.norm(dim=-1, keepdim=True)


def projected(features: Any) -> Tensor:
    """The tensor of get_*_features: transformers 5 returns an object with it as pooler_output, 4 the tensor itself."""
    return features if isinstance(features, Tensor) else features.pooler_output


def _pads(model: Any) -> bool:
    return model.config.model_type != "clip"
