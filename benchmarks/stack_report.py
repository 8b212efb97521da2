"""How long the analysis of a stack of ten full-size LoRAs takes, from their files.

    python -m benchmarks.stack_report

The LoRAs are random, of rank 16, on the 722 linear layers of the transformers of SDXL's UNet.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import nn

import sdxl_lora_core.sdxl
from sdxl_lora_core.lora.analysis import analyse_stack
from sdxl_lora_core.lora.analysis_chart import stack_chart
from sdxl_lora_core.lora.files import write_lora
from sdxl_lora_core.lora.modules import LoRAFile, LoRAModule
from sdxl_lora_core.lora.stack import LoRARef, open_stack

COUNT, RANK = 10, 16


def main() -> None:
    shapes = linear_shapes()
    with tempfile.TemporaryDirectory() as folder:
        files = [write_random(Path(folder) / f"{number}.safetensors", shapes, number) for number in range(COUNT)]
        began = time.perf_counter()
        analysis = analyse_stack(open_stack([LoRARef(file, file.stem, 1.0, 1.0) for file in files], None))
        read = time.perf_counter() - began
        stack_chart(analysis)
        drawn = time.perf_counter() - began - read
    worst = max(abs(overlap.cosine) for pair in analysis.pairs for overlap in pair.blocks.values())
    print(f"{COUNT} LoRAs of rank {RANK} on {len(shapes)} layers: {read:.1f} s, and {drawn:.1f} s for the chart")
    print(f"largest cosine of two random LoRAs in a block: {worst:.4f}")


def linear_shapes() -> dict[str, torch.Size]:
    config = Path(sdxl_lora_core.sdxl.__file__).parent / "configs/unet/config.json"
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(config))
    layers = [(name, module) for name, module in unet.named_modules() if "attentions" in name]
    return {name: module.weight.shape for name, module in layers if isinstance(module, nn.Linear)}


def write_random(path: Path, shapes: dict[str, torch.Size], seed: int) -> Path:
    draw = torch.Generator().manual_seed(seed)

    def module(rows: int, columns: int) -> LoRAModule:
        down, up = torch.randn(RANK, columns, generator=draw), torch.randn(rows, RANK, generator=draw)
        return LoRAModule(down * 0.01, up * 0.01, float(RANK))

    write_lora(path, LoRAFile(unet={name: module(*shape) for name, shape in shapes.items()}), torch.float16)
    return path


if __name__ == "__main__":
    main()
