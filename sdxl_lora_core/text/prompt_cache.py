"""Prompt embeddings, computed once and cached on disk by content."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..cache.tensor_cache import Load, OnItem, is_readable, load_tensors, minor_version, store_tensors
from ..files import json_sha256
from ..runtime.device import release_memory
from ..sdxl.base import SDXLBase, load_part, load_tokenizers
from .encoding import encode_prompt_sdxl


def load_prompt(path: Path, load: Load = load_tensors) -> tuple[Tensor, Tensor]:
    """The embeddings [77 n, C] and pooled embeddings [P] of one prompt."""
    tensors = load(path)
    return tensors["embeds"], tensors["pooled"]


def store_prompt(path: Path, embeds: Tensor, pooled: Tensor) -> None:
    """Writes a file for `load_prompt`."""
    store_tensors(path, {"embeds": embeds, "pooled": pooled})


@dataclass(frozen=True)
class PromptKeys:
    """Names the files of prompt embeddings by what they depend on.

    Embeddings differ in the last bits between kinds of devices, so each kind has its own. `chunks` is the number of
    75-token chunks of a caption.
    """

    base: SDXLBase
    dtype: torch.dtype
    device: torch.device
    chunks: int = 1

    def file(self, folder: Path, prompt: str, reading: Mapping[str, Any] = MappingProxyType({})) -> Path:
        """The path of a prompt's embeddings.

        `reading` is what they depend on if the prompt is not read as a caption.
        """
        hashes, family = dict(self.base.part_hashes), self.base.family
        key = json_sha256(
            {
                "prompt": prompt,
                "encoders": [hashes[name] for name in (*family.encoders, *family.tokenizers)],
                "dtype": str(self.dtype),
                "device": self.device.type,
                "library": minor_version("transformers"),
                **({"chunks": self.chunks} if self.chunks > 1 else {}),
                **reading,
            }
        )
        return folder / key[:2] / f"{key}.safetensors"


def cache_prompts(keys: PromptKeys, prompts: Mapping[str, Path], on_item: OnItem) -> None:
    """Encodes the prompts that are not on disk yet, each to its file. The text encoders are released on return."""
    missing = {prompt: path for prompt, path in prompts.items() if not is_readable(path)}
    if not missing:
        return
    tokenizers = load_tokenizers(keys.base)
    encoders = [load_part(keys.base, part, keys.dtype, keys.device) for part in keys.base.family.encoders]
    for done, (prompt, path) in enumerate(missing.items()):
        on_item("encoding captions", done, len(missing))
        with torch.no_grad():
            embeds, pooled = encode_prompt_sdxl([prompt], tokenizers, encoders, keys.chunks)
        store_prompt(path, embeds[0].cpu(), pooled[0].cpu())
    del encoders
    release_memory(keys.device)
