"""Prompt embeddings, computed once and kept on disk by content."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..cache.tensor_cache import OnItem, is_readable, minor_version, store_tensors
from ..files import json_sha256
from ..runtime.device import release_memory
from ..sdxl.base import SDXLBase, load_part, load_tokenizers
from .encoding import encode_prompt_sdxl


def load_prompt(path: Path) -> tuple[Tensor, Tensor]:
    """Embeddings [77 n, C] and pooled embeddings [P] of one prompt."""
    tensors = load_file(path)
    return tensors["embeds"], tensors["pooled"]


def store_prompt(path: Path, embeds: Tensor, pooled: Tensor) -> None:
    """Writes what `load_prompt` reads."""
    store_tensors(path, {"embeds": embeds, "pooled": pooled})


def prompt_file(
    base: SDXLBase,
    prompt: str,
    cache: Path,
    dtype: torch.dtype,
    device: torch.device,
    chunks: int = 1,
    reading: Mapping[str, Any] | None = None,
) -> Path:
    """Where a prompt's embeddings lie, or will lie. Kinds of device differ in the last bits, so each has its own.

    `reading` is what else they depend on, where a prompt is not read as captions are.
    """
    hashes = dict(base.part_hashes)
    key = json_sha256(
        {
            "prompt": prompt,
            "encoders": [hashes[part] for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")],
            "dtype": str(dtype),
            "device": device.type,
            "library": minor_version("transformers"),
        }
        | ({"chunks": chunks} if chunks > 1 else {})
        | dict(reading or {})
    )
    return cache / "prompts" / "v1" / key[:2] / f"{key}.safetensors"


def cache_prompts(
    base: SDXLBase, prompts: Mapping[str, Path], device: torch.device, dtype: torch.dtype, chunks: int, on_item: OnItem
) -> None:
    """Encodes what is not on disk yet, each to its prompt_file. The text encoders are gone from memory on return."""
    missing = {prompt: path for prompt, path in prompts.items() if not is_readable(path)}
    if not missing:
        return
    tokenizers = load_tokenizers(base)
    encoders = [load_part(base, part, dtype, device) for part in ("text_encoder", "text_encoder_2")]
    for done, (prompt, path) in enumerate(missing.items()):
        on_item("encoding captions", done, len(missing))
        with torch.no_grad():
            embeds, pooled = encode_prompt_sdxl([prompt], tokenizers, encoders, chunks)
        store_prompt(path, embeds[0].cpu(), pooled[0].cpu())
    del encoders
    release_memory(device)
