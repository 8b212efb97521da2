"""Reads single weights of a base from its files, without loading the part they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from .base import SDXLBase
from .checkpoint_names import openclip_place
from .family import Part
from .file_kinds import TEXT, UNET
from .loading import find_weights
from .unet_names import sai_block_name


class BaseWeights:
    """A part's weights by the path of their module, or by the path of a bias (ending in .bias), as LoRAs name them."""

    def __init__(self, base: SDXLBase, part: Part) -> None:
        self._base, self._part = base, part
        self._files = [base.path] if base.layout == "single_file" else find_weights(base.path / part)[1]
        self._where: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for file in self._files:
            with safe_open(file, framework="pt") as weights:
                self._where |= dict.fromkeys(weights.keys(), file)

    def has(self, names: Iterable[str]) -> bool:
        """Whether all can be read; the second text encoder's projection, transposed in single files, cannot."""
        return all(self._place(name) is not None for name in names)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Opens the files for `read`. Pages that were read count as memory until the files are closed."""
        with ExitStack() as stack:
            self._open = {file: stack.enter_context(safe_open(file, framework="pt")) for file in self._files}
            yield
            self._open = {}

    def read(self, name: str) -> Tensor:
        """The weight as stored in the file, memory-mapped, on the CPU. Raises KeyError if it is not there."""
        place = self._place(name)
        if place is None:
            raise KeyError(name)
        key, third = place
        tensor = self._open[self._where[key]].get_tensor(key)
        return tensor if third is None else tensor.chunk(3)[third]

    def _place(self, name: str) -> tuple[str, int | None] | None:
        path, leaf = (name.removesuffix(".bias"), "bias") if name.endswith(".bias") else (name, "weight")
        return next((place for place in self._places(path, leaf) if place[0] in self._where), None)

    def _places(self, path: str, leaf: str) -> list[tuple[str, int | None]]:
        """The possible names of a weight in the files, each with the third of that tensor that it is (None: all)."""
        if self._base.layout == "diffusers":
            return [(f"{path}.{leaf}", None), (f"{path.removeprefix('text_model.')}.{leaf}", None)]
        if self._part == "unet":
            return [(f"{UNET}{sai_block_name(path)}.{leaf}", None)]
        if self._part == "text_encoder_2":
            return [openclip_place(f"{path}.{leaf}")]
        return [(f"{TEXT}{path}.{leaf}", None)]
