"""Single weights of a base, read again from its files without loading the part they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .base_model import SDXLBase
from .base_parts import Part, find_weights
from .lora_names import sai_block_name
from .model_kinds import TEXT, UNET


class BaseWeights:
    """A part's weights by the path of their module, or the path of a bias (`....bias`), as LoRAs name them."""

    def __init__(self, base: SDXLBase, part: Part, dtype: torch.dtype) -> None:
        self._base, self._part, self._dtype = base, part, dtype
        self._files = [base.path] if base.layout == "single_file" else find_weights(base.path / part)[1]
        self._where: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for file in self._files:
            with safe_open(file, framework="pt") as weights:
                self._where |= dict.fromkeys(weights.keys(), file)

    def has(self, names: Iterable[str]) -> bool:
        """Whether all of them can be read. The second text encoder of a single file has other matrices than ours."""
        return all(self._key(name) is not None for name in names)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Needed around read. What was read of an open file counts as memory until it closes."""
        with ExitStack() as stack:
            self._open = {file: stack.enter_context(safe_open(file, framework="pt")) for file in self._files}
            yield
            self._open = {}

    def read(self, name: str) -> Tensor:
        """The weight at the precision that the part is computed in, on the CPU; mapped if the file has it so."""
        key = self._key(name)
        if key is None:
            raise KeyError(name)
        return self._open[self._where[key]].get_tensor(key).to(self._dtype)

    def _key(self, name: str) -> str | None:
        path, leaf = (name.removesuffix(".bias"), "bias") if name.endswith(".bias") else (name, "weight")
        return next((key for key in self._spellings(path, leaf) if key in self._where), None)

    def _spellings(self, path: str, leaf: str) -> list[str]:
        if self._base.layout == "diffusers":
            return [f"{path}.{leaf}", f"{path.removeprefix('text_model.')}.{leaf}"]
        if self._part == "unet":
            return [f"{UNET}{sai_block_name(path)}.{leaf}"]
        return [f"{TEXT}{path}.{leaf}"] if self._part == "text_encoder" else []
