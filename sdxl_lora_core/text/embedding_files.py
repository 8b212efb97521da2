"""Textual inversion files, which a prompt refers to by `embedding:name`.

SDXL needs vectors for both of its text encoders. Those for the first are also Stable Diffusion 1.5's.

| writer                           | keys                                              |
|----------------------------------|---------------------------------------------------|
| this pack, kohya, A1111, ComfyUI | clip_l, clip_g                                    |
| diffusers' pivotal tuning        | text_encoders_0, text_encoders_1                  |
| OneTrainer, in a LoRA            | bundle_emb.NAME.clip_l, bundle_emb.NAME.clip_g    |
| those of Stable Diffusion 1, 2   | emb_params, or any one name                       |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..files import file_sha256, write_atomic
from ..safetensors_file import WeightsHeader, first_names, read_header, save_tensors
from ..sdxl.family import SDXL, Family, Part

ENCODER_KEYS: Mapping[Part, str] = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}

_SPELLINGS: tuple[Mapping[Part, str], ...] = (
    ENCODER_KEYS,
    {"text_encoder": "text_encoders_0", "text_encoder_2": "text_encoders_1"},
)
_OTHERS = {768: "for Stable Diffusion 1.x", 1024: "for Stable Diffusion 2.x"}  # by the length of a vector
_ENCODERS: Mapping[str, Part] = {key: part for part, key in ENCODER_KEYS.items()}
_BUNDLED = re.compile(rf"bundle_emb\.(.+)\.({'|'.join(_ENCODERS)})")

Vectors = Mapping[Part, Tensor]  # of one token: [n, 768] for the first encoder, [n, 1280] for the second


@dataclass(frozen=True)
class EmbeddingFile:
    """A file that open_embedding has checked. Its vectors are read when a prompt is encoded."""

    name: str
    path: Path
    sha256: str

    def vectors(self) -> Vectors:
        """float32, the same number for each text encoder. Raises ValueError if they are not finite."""
        tensors, keys = load_file(self.path), _keys(read_header(self.path))
        vectors: dict[Part, Tensor] = {
            part: torch.cat([_rows(tensors[key]) for key in names]) for part, names in keys.items()
        }
        if not all(rows.isfinite().all() for rows in vectors.values()):
            raise ValueError(f"embedding:{self.name} contains NaN or infinity: download it again, or use another")
        return vectors


def open_embedding(name: str, path: Path, hash_memo: Path | None, family: Family = SDXL) -> EmbeddingFile:
    """Reads the header. Raises ValueError for pickles and for embeddings that are not for all encoders of the family.

    Whether the vectors have the length of the encoders' is seen when they are read.
    """
    try:
        header = read_header(path)
    except ValueError as error:
        raise ValueError(f"embedding:{name} cannot be read: {error}") from error
    keys = _keys(header)
    counts = [sum(_count(header.shapes[key]) for key in keys[part]) for part in family.encoders if part in keys]
    if not counts:
        raise ValueError(f"embedding:{name} is {_kind(header)}: use one made for {family.title}")
    if len(counts) < len(family.encoders):
        raise ValueError(
            f"embedding:{name} is {_kind(header)}: SDXL needs vectors for both of its text encoders, clip_l and "
            "clip_g, so use the SDXL version of the embedding"
        )
    if len(set(counts)) > 1:
        raise ValueError(
            f"embedding:{name} has {counts[0]} vectors for one text encoder and {counts[1]} for the other: "
            "the file is damaged, download it again"
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
    if not keys and len(header.shapes) == 1:  # Stable Diffusion 1's, or 2's
        return {"text_encoder": list(header.shapes)}
    return keys


def _kind(header: WeightsHeader) -> str:
    widths = {shape[-1] for shape in header.shapes.values() if shape}
    known = [what for width, what in _OTHERS.items() if widths == {width}]
    return (
        known[0] if known else f"not an embedding for SDXL (its first tensors: {first_names(header.shapes) or 'none'})"
    )


def _rows(tensor: Tensor) -> Tensor:
    return tensor.float().reshape(-1, tensor.shape[-1])


def _count(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) > 1 else 1


class Token(NamedTuple):
    """A new token and the text encoder that a tensor of vectors is for."""

    name: str
    part: Part


def bundled_token(key: str) -> Token | None:
    """The token of a key in a LoRA file, or None. The key format is OneTrainer's; A1111 and ComfyUI read it too."""
    found = _BUNDLED.fullmatch(key)
    return Token(found[1], _ENCODERS[found[2]]) if found else None


def bundled_key(name: str, part: Part) -> str:
    """The inverse of bundled_token."""
    return f"bundle_emb.{name}.{ENCODER_KEYS[part]}"


def write_embedding(path: Path, vectors: Vectors) -> None:
    """Writes the vectors of one token as ComfyUI and A1111 read them: float32 clip_l and clip_g."""
    tensors = {ENCODER_KEYS[part]: tensor.float() for part, tensor in vectors.items()}
    write_atomic(path, lambda file: save_tensors(file, tensors))
