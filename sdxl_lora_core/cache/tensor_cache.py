"""Tensors on disk by content: whole or not there, and made anew if damaged."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..files import write_atomic
from ..safetensors_file import save_tensors

log = logging.getLogger("sdxl_lora")

OnItem = Callable[[str, int, int], None]


def store_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    write_atomic(path, lambda temporary: save_tensors(temporary, tensors))


def is_readable(path: Path) -> bool:
    """Whether the cached file is there and whole; a damaged one is made again."""
    if not path.exists():
        return False
    try:
        load_file(path)
    except SafetensorError:
        log.warning("the cached file %s is damaged and will be made again", path.name)
        return False
    return True


def minor_version(library: str) -> str:
    """What a cached value depends on of a library: patches change no number."""
    return ".".join(version(library).split(".")[:2])
