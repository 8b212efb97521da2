"""The settings of memory and precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...sdxl.precision import Precision
from ...settings import Range, setting

Checkpointing = Literal["auto", "off", "selective", "on"]
WeightFormat = Literal["full", "fp8", "int8"]
BaseWeights = Literal["auto", "full", "fp8", "int8"]
ALL_BLOCKS = 1000  # more than any UNet has


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """The batch size, the precision, and what saves memory."""

    batch_size: int = setting(1, "Images per batch. Larger batches are less noisy and need more memory.", Range(1, 256))
    precision: Precision = setting(
        "auto",
        "Precision of the frozen weights; the LoRA itself is trained in fp32. auto: bf16 or fp16 on a GPU, fp32 on the "
        "CPU.",
    )
    gradient_checkpointing: Checkpointing = setting(
        "auto",
        "Saves memory by recomputing activations. auto: only as much as needed; selective: about half the memory at "
        "little cost; on: least memory, steps take a third longer.",
    )
    images_per_pass: int = setting(
        0,
        "Images that pass through the UNet at once, at most batch_size; the update stays the same. 0: as many as fit.",
        Range(0, 256),
    )
    memory_limit_gb: float = setting(
        0.0,
        "Memory that the run may use, in GB, if other programs need some. 0: all that is free.",
        Range(0, 4096, step=0.5),
    )
    deterministic: bool = setting(
        False,
        "Bit-identical results on a GPU, at some cost in speed. On the CPU they always are.",
    )
    base_weights: BaseWeights = setting(
        "full",
        "Format of the UNet's frozen weights. full: that of precision. int8 and fp8 take half of bf16's memory at a "
        "small error; the LoRA is for the original base all the same. auto: full if it fits, else int8.",
        since="0.4",
    )
    offload_blocks: int = setting(
        -1,
        "Blocks of the UNet whose weights wait in main memory and are copied to the GPU when they are needed: less "
        "memory, longer steps, equal results. 0: none; 1000: all; -1: as many as needed.",
        Range(-1, ALL_BLOCKS),
        since="0.4",
    )


def check_memory(settings: MemorySettings) -> None:
    if settings.images_per_pass > settings.batch_size:
        raise ValueError(
            f"images_per_pass is {settings.images_per_pass} and batch_size is {settings.batch_size}: a pass has "
            "at most one batch, so lower it, or raise batch_size"
        )
