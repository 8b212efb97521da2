"""Tensors cached on disk by content."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from ..files import write_atomic
from ..safetensors_file import read_header, save_tensors

log = logging.getLogger("sdxl_lora")

Load = Callable[[Path], dict[str, Tensor]]
OnItem = Callable[[str, int, int], None]


def store_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    write_atomic(path, lambda temporary: save_tensors(temporary, tensors))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a cached file. Raises FileNotFoundError with the remedy if it was deleted meanwhile."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the cached file {path.name} was deleted while a training needs it: start the training again, which "
            "computes the file again and resumes at the last checkpoint"
        ) from error


def is_readable(path: Path) -> bool:
    """Whether the cached file exists and is complete, by its header and size; a damaged one is computed again."""
    if not path.exists():
        return False
    try:
        read_header(path)
    except ValueError:
        log.warning("the cached file %s is damaged and will be computed again", path.name)
        return False
    return True


def minor_version(library: str) -> str:
    """The version of a library that cached values depend on: patch releases change no number."""
    return ".".join(version(library).split(".")[:2])
