"""The settings of memory and precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...sdxl.precision import Precision
from ...settings import Range, setting

Checkpointing = Literal["auto", "off", "selective", "on"]


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


def check_memory(settings: MemorySettings) -> None:
    if settings.images_per_pass > settings.batch_size:
        raise ValueError(
            f"images_per_pass is {settings.images_per_pass} and batch_size is {settings.batch_size}: a pass has "
            "at most one batch, so lower it, or raise batch_size"
        )
