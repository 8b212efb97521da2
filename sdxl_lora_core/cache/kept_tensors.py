"""Cached tensors that stay in main memory, so that a training step reads no file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..runtime.device import free_memory
from .tensor_cache import load_tensors

_SHARE = 0.25  # of the free main memory


class KeptTensors:
    """The contents of cache files, up to `limit` bytes in all; by default a quarter of the free main memory.

    What came first stays: a run reads all of its files in turn, so that the last one used is needed last.
    """

    def __init__(self, limit: float | None = None) -> None:
        self.limit = _SHARE * free_memory(torch.device("cpu")) if limit is None else limit
        self.size = 0
        self._tensors: dict[Path, dict[str, Tensor]] = {}

    def load(self, path: Path) -> dict[str, Tensor]:
        """load_tensors, from memory if the file was kept. The tensors must not be changed."""
        if path in self._tensors:
            return self._tensors[path]
        tensors = load_tensors(path)
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self.size + size > self.limit:
            return tensors
        self.size += size
        # Copies, because those of a file are mapped: the system may drop them, and allows only so many mappings.
        self._tensors[path] = {name: tensor.clone() for name, tensor in tensors.items()}
        return self._tensors[path]
