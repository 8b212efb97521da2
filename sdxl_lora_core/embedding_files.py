"""Files with the vectors of one new word, which a prompt puts in by `embedding:name`.

| writer                           | keys                                              |
|----------------------------------|---------------------------------------------------|
| this pack, kohya, A1111, ComfyUI | clip_l, clip_g                                    |
| diffusers' pivotal tuning        | text_encoders_0, text_encoders_1                  |
| OneTrainer, in a LoRA            | bundle_emb.NAME.clip_l, bundle_emb.NAME.clip_g    |
| those of Stable Diffusion 1, 2   | emb_params, or any one name: refused              |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from .files import file_sha256
from .lora_dialects import ENCODER_KEYS, bundled_token
from .new_tokens import Vectors
from .safetensors_file import WeightsHeader, first_names, read_header
from .sdxl.loading import ENCODERS, Part

_SPELLINGS: tuple[Mapping[Part, str], ...] = (
    ENCODER_KEYS,
    {"text_encoder": "text_encoders_0", "text_encoder_2": "text_encoders_1"},
)
_OTHERS = {768: "for Stable Diffusion 1.x", 1024: "for Stable Diffusion 2.x"}  # by the length of a vector


@dataclass(frozen=True)
class EmbeddingFile:
    """A file that open_embedding found whole. Its vectors are read when a text encoder needs them."""

    name: str
    path: Path
    sha256: str

    def vectors(self) -> Vectors:
        """float32, as many for each text encoder. Raises ValueError if they are not finite."""
        tensors, keys = load_file(self.path), _keys(read_header(self.path))
        vectors: dict[Part, Tensor] = {
            part: torch.cat([_rows(tensors[key]) for key in keys[part]]) for part in ENCODERS
        }
        if not all(rows.isfinite().all() for rows in vectors.values()):
            raise ValueError(f"embedding:{self.name} holds NaN or infinity: fetch it again, or take another")
        return vectors


def open_embedding(name: str, path: Path, hash_memo: Path | None) -> EmbeddingFile:
    """Reads its header only. Raises ValueError for pickles and for what SDXL's two text encoders have no use for."""
    try:
        header = read_header(path)
    except ValueError as error:
        raise ValueError(f"embedding:{name} cannot be read: {error}") from error
    keys = _keys(header)
    counts = [sum(_count(header.shapes[key]) for key in keys[part]) for part in ENCODERS if part in keys]
    if len(counts) < len(ENCODERS):
        raise ValueError(
            f"embedding:{name} is {_kind(header)}: SDXL needs vectors for both of its text encoders, clip_l and "
            "clip_g, so take the embedding's SDXL version"
        )
    if len(set(counts)) > 1:
        raise ValueError(
            f"embedding:{name} has {counts[0]} vectors for one text encoder and {counts[1]} for the other: "
            "the file is damaged, fetch it again"
        )
    return EmbeddingFile(name, path, file_sha256(path, hash_memo))


def _keys(header: WeightsHeader) -> dict[Part, list[str]]:
    """The names of each encoder's tensors."""
    for spelling in _SPELLINGS:
        if all(key in header.shapes for key in spelling.values()):
            return {part: [key] for part, key in spelling.items()}
    keys: dict[Part, list[str]] = {}
    for key in sorted(header.shapes):
        if token := bundled_token(key):
            keys.setdefault(token.part, []).append(key)
    return keys


def _kind(header: WeightsHeader) -> str:
    widths = {shape[-1] for shape in header.shapes.values() if shape}
    known = [what for width, what in _OTHERS.items() if widths == {width}]
    return known[0] if known else f"no embedding for SDXL (its first tensors: {first_names(header.shapes) or 'none'})"


def _rows(tensor: Tensor) -> Tensor:
    return tensor.float().reshape(-1, tensor.shape[-1])


def _count(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) > 1 else 1
