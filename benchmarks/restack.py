"""How long changing one strength of a stack of five LoRAs takes on a full-size SDXL in bf16, and what memory it needs.

    python -m benchmarks.restack BASE [--memo FOLDER]

BASE is a checkpoint or a diffusers folder; only the UNet is read. The LoRAs are random, of rank 8, on the 560 modules
of the attentions and on all 722 of the transformers. In the end the stack is taken off and every tensor compared with
the base's.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from sdxl_lora_core.lora.files import write_lora
from sdxl_lora_core.lora.modules import LoRAFile, LoRAModule
from sdxl_lora_core.lora.stack import LoRARef, StackEntry, open_stack
from sdxl_lora_core.lora.stacked_part import StackedPart
from sdxl_lora_core.runtime.loaded_parts import Loaded
from sdxl_lora_core.sdxl.base import SDXLBase, load_part, open_base

COUNT, RANK = 5, 8
ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--memo", type=Path, help="a folder that remembers the hashes of large files")
    options = parser.parse_args()
    base = open_base(options.base, "bf16", options.memo)
    bare: Any = load_part(base, "unet", torch.bfloat16)
    before = content(bare)
    linear = [name for name, module in bare.named_modules() if isinstance(module, nn.Linear) and "attentions" in name]
    attention = [name for name in linear if name.endswith(ATTENTION)]
    shapes = {name: tuple(bare.get_submodule(name).weight.shape) for name in linear}
    del bare
    with tempfile.TemporaryDirectory() as folder:
        for names in (attention, linear):
            files = [
                write_random(Path(folder) / f"{len(names)}-{n}.safetensors", shapes, names, n) for n in range(COUNT)
            ]
            measure(base, before, files, names)


def content(unet: nn.Module) -> dict[str, str]:
    """A hash of each tensor."""
    return {
        name: hashlib.sha256(tensor.view(torch.uint8).numpy()).hexdigest() for name, tensor in unet.state_dict().items()
    }


def write_random(path: Path, shapes: dict[str, tuple[int, int]], names: list[str], seed: int) -> Path:
    draw = torch.Generator().manual_seed(seed)

    def module(name: str) -> LoRAModule:
        rows, columns = shapes[name]
        down, up = torch.randn(RANK, columns, generator=draw), torch.randn(rows, RANK, generator=draw)
        return LoRAModule(down * 0.01, up * 0.01, float(RANK))

    write_lora(path, LoRAFile(unet={name: module(name) for name in names}), torch.float16)
    return path


def measure(base: SDXLBase, before: dict[str, str], files: list[Path], names: list[str]) -> None:
    def stack(*strengths: float) -> tuple[StackEntry, ...]:
        pairs = zip(files, strengths, strict=True)
        return open_stack([LoRARef(path, path.stem, strength, 0.0) for path, strength in pairs], None)

    def part(entries: tuple[StackEntry, ...]) -> StackedPart:
        return StackedPart(base, "unet", torch.bfloat16, entries)

    loaded = part(stack(1.0, 1.0, 1.0, 1.0, 1.0)).load()
    unet = loaded.module
    times = []
    for strength in (0.9, 0.8, 0.7):
        entries = stack(1.0, 1.0, strength, 1.0, 1.0)
        with Peak() as peak:
            start = time.perf_counter()
            loaded = restacked(loaded, part(entries))
            times.append(time.perf_counter() - start)
    touched = sum(unet.get_submodule(name).weight.nbytes for name in names)  # type: ignore[misc]
    seconds = ", ".join(f"{value:.2f}" for value in times)
    print(f"{len(names)} modules: one strength changed in {seconds} s on {torch.get_num_threads()} threads;", end=" ")
    print(f"extra memory {peak.bytes / 1e6:.0f} MB, the touched weights are {touched / 1e6:.0f} MB")
    restacked(loaded, part(stack(0, 0, 0, 0, 0)))
    print("  taken off: every tensor is the base's:", content(unet) == before)


def restacked(loaded: Loaded, wanted: StackedPart) -> Loaded:
    changed = wanted.restack(loaded)
    assert changed is not None
    return changed


class Peak:
    """The most memory of this process inside the block, mapped files included, over what it had before."""

    def __enter__(self) -> Peak:
        self._process, self._over = psutil.Process(), threading.Event()
        self._before = self.bytes = self._process.memory_info().rss
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self.bytes = max(self.bytes, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watcher.join()
        self.bytes -= self._before


if __name__ == "__main__":
    main()
