"""Reads headers of safetensors files, writes equal bytes for equal content, and names other kinds of files."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .files import write_atomic
from .messages import brief, shown

_PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle"}
_MAGIC = {
    b"PK\x03\x04": "a PyTorch pickle",
    b"\x80": "a Python pickle",
    b"GGUF": "a GGUF file",
    b"<": "a web page instead of the file: download it again, logged in if the site asks for it",
    b"{": "a JSON text instead of the file: download it again, logged in if the site asks for it",
    b"version h": "a Git LFS pointer instead of the file: run git lfs pull, or download the file itself",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"Rar!": "a RAR archive: unpack it",
}


@dataclass(frozen=True)
class WeightsHeader:
    """The header of a safetensors file: the shape of every tensor by name, and the free-form metadata."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]

    def has(self, *prefixes: str) -> bool:
        """Whether each prefix is the start of at least one tensor's name."""
        return all(any(name.startswith(prefix) for name in self.shapes) for prefix in prefixes)


def read_header(path: Path) -> WeightsHeader:
    """Reads the header without the weights. The safetensors library rejects headers over 100 MB and truncated files.

    Raises FileNotFoundError, or ValueError for pickles (they are never opened), damaged files and other formats.
    """
    _require_safetensors(path)
    try:
        with safe_open(path, framework="np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return WeightsHeader(path, shapes, dict(file.metadata() or {}))
    except SafetensorError as error:
        raise ValueError(
            f"{path.name} is not a complete safetensors file ({brief(error)}): truncated or damaged, download or save "
            "it again"
        ) from error


def first_names(names: Iterable[str], count: int = 3) -> str:
    return ", ".join(shown(name)[1:-1] for name in sorted(names)[:count])


@dataclass(frozen=True)
class PackedWeights:
    """The content of a safetensors file: the header's entries, and the bytes after the header."""

    entries: Mapping[str, Any]
    data: memoryview


def pack_weights(tensors: Mapping[str, Tensor]) -> PackedWeights:
    """Serializes tensors, which must be contiguous and on the CPU."""
    whole = safetensors.torch.save(dict(tensors))
    start = 8 + int.from_bytes(whole[:8], "little")
    return PackedWeights(json.loads(whole[8:start]), memoryview(whole)[start:])


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a file, not atomically. Raises OSError, instead of the library's own error, if the disk is full."""
    try:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(contiguous, path, None if metadata is None else dict(metadata))
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from error


def write_weights(path: Path, packed: PackedWeights, metadata: Mapping[str, str]) -> None:
    """Writes a file atomically, equal bytes for equal content: the library itself writes metadata in random order.

    The file is read back before it gets its name. Raises ValueError if no program could read it.
    """
    header = json.dumps({"__metadata__": dict(sorted(metadata.items())), **packed.entries}, separators=(",", ":"))
    text = header.encode("ascii")
    text += b" " * (-len(text) % 8)  # tensors start on multiples of 8

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            file.write(packed.data)
        read_header(temporary)

    write_atomic(path, write)


def _require_safetensors(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is not a file: use a .safetensors file")
    kind = _foreign_kind(path)
    if kind is None:
        return
    if "pickle" in kind:
        raise ValueError(
            f"{path.name} is {kind}, which is not opened because it can run arbitrary code:"
            " convert it to .safetensors, or use the .safetensors file of the same model"
        )
    raise ValueError(f"{path.name} is {kind}" if ":" in kind else f"{path.name} is {kind}: use a .safetensors file")


def _foreign_kind(path: Path) -> str | None:
    if path.suffix.lower() in _PICKLES:
        return "a pickle"
    with open(path, "rb") as handle:
        start = handle.read(9)
    if start[8:] == b"{":  # safetensors: the length of the header, which may be any eight bytes, and its JSON
        return None
    return next((what for magic, what in _MAGIC.items() if start.startswith(magic)), None)
