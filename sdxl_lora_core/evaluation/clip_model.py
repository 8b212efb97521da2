"""Loads a CLIP model from a local transformers folder, and embeds texts and images as unit vectors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..files import file_sha256, json_sha256
from ..messages import brief, shown
from ..runtime.library_logs import quiet_libraries

_IMAGES_AT_ONCE = 8
_LEGACY_EOS = 2  # in configs from before transformers 4.31: the model then pools at the highest token id


def load_clip(folder: Path) -> torch.nn.Module:
    """The CLIPModel of a local transformers folder, float32, eval mode, on the CPU.

    Reads safetensors only and downloads nothing. Raises FileNotFoundError or ValueError naming what is missing.
    """
    from safetensors import SafetensorError
    from transformers import CLIPModel

    require_clip_folder(folder)
    try:
        with (
            quiet_libraries(),
            torch.random.fork_rng(devices=[]),
        ):  # transformers 4 initializes weights first
            loaded: Any = CLIPModel.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"the CLIP model in {folder.name!r} cannot be loaded: {brief(error)}") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"the CLIP model in {folder.name!r} lacks {len(missing)} weights, as {missing[0]}: copy the whole model"
        )
    return model.float().eval().requires_grad_(False)


def load_tokenizer(folder: Path, model: Any) -> Any:
    """The folder's tokenizer. Raises FileNotFoundError if there is none, ValueError if it belongs to another model."""
    from transformers import AutoTokenizer

    # Without these files transformers would silently create an empty tokenizer.
    pair = ("vocab.json", "merges.txt")
    if not (folder / "tokenizer.json").is_file() and not all((folder / name).is_file() for name in pair):
        raise FileNotFoundError(
            f"{folder.name!r} has neither tokenizer.json nor both of vocab.json and merges.txt: copy the tokenizer "
            "files to it"
        )
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    end, expected = tokenizer.eos_token_id, model.config.text_config.eos_token_id
    fits = end == len(tokenizer) - 1 if expected == _LEGACY_EOS else end == expected
    if not fits or len(tokenizer) > model.config.text_config.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder.name!r} ({len(tokenizer)} tokens, end token {end}) does not belong to this "
            f"model ({model.config.text_config.vocab_size} tokens, end token {expected}): copy the model's tokenizer"
        )
    return tokenizer


def load_processor(folder: Path, model: Any) -> Any:
    """The image processor based on Pillow: scores must not depend on whether torchvision is installed."""
    import transformers

    # In transformers 4 the one based on Pillow has the plain name.
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    if any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return kind.from_pretrained(str(folder), local_files_only=True)
    side = model.config.vision_config.image_size
    return kind(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def embed_text(model: Any, tokenizer: Any, text: str, warnings: list[str]) -> Tensor:
    """A text as a unit vector, float32 [D] on the CPU. Adds to `warnings` what is truncated.

    Each text is encoded alone and without padding, so that it does not depend on the others. Truncation keeps the end
    token, where CLIP pools.
    """
    limit = model.config.text_config.max_position_embeddings
    whole = tokenizer(text, truncation=False, verbose=False)["input_ids"]
    cut = tokenizer(text, truncation=True, max_length=limit)["input_ids"]
    if not text:
        warnings.append("a prompt has no text: its scores are meaningless")
    if len(whole) > len(cut):
        lost = tokenizer.decode(whole[len(cut) - 1 : -1]).strip()
        warnings.append(f"a prompt of {len(whole) - 2} tokens was truncated to {limit - 2}; not scored: {lost!r}")
    return _normalised(model.get_text_features(input_ids=torch.tensor([cut], device=model.device)))[0]


def embed_images(model: Any, processor: Any, images: Sequence[np.ndarray]) -> Tensor:
    """Images (uint8 [H, W, 3]) as unit vectors, float32 [N, D] on the CPU."""
    features = []
    for start in range(0, len(images), _IMAGES_AT_ONCE):
        batch = [Image.fromarray(image) for image in images[start : start + _IMAGES_AT_ONCE]]
        pixels = processor(images=batch, return_tensors="pt")["pixel_values"]
        features.append(_normalised(model.get_image_features(pixel_values=pixels.to(model.device))))
    return torch.cat(features)


def clip_fingerprint(folder: Path) -> str:
    """A hash of the content of the model's files, independent of the folder's name."""
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors", ".txt"))
    return json_sha256([[file.name, file_sha256(file)] for file in files])


def require_clip_folder(folder: Path) -> None:
    """Raises FileNotFoundError or ValueError naming what a CLIP model's folder lacks. Opens no weights."""
    wanted = "use a folder with a CLIP model of transformers (config.json, model.safetensors, tokenizer files)"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder.name!r} has no config.json: {wanted}")
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder.name}/config.json is not a JSON object: {wanted}") from error
    if kind != "clip":
        raise ValueError(
            f"{folder.name!r} contains a model of type {shown(kind)}, not 'clip' (image and text): {wanted}"
        )
    if not any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        raise FileNotFoundError(f"{folder.name!r} has no model.safetensors (other formats are not opened): {wanted}")


def _normalised(features: Any) -> Tensor:
    # Transformers 5 returns an object here, with the projected features as pooler_output; 4 returns the tensor.
    tensor = features if isinstance(features, Tensor) else features.pooler_output
    tensor = tensor.float().cpu()
    return tensor / tensor.norm(dim=-1, keepdim=True)
