"""How a run fits into memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...sdxl.precision import Precision
from ...settings import setting

Checkpointing = Literal["auto", "off", "selective", "on"]


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """How much goes through the UNet at once, in which number format."""

    batch_size: int = setting(1, "Images per pass. More is steadier and needs more memory.", low=1, high=256)
    precision: Precision = setting(
        "auto",
        "Number format of the frozen weights while training; the LoRA itself learns in fp32. "
        "auto: bf16 or fp16 on a GPU, fp32 on the CPU.",
    )
    gradient_checkpointing: Checkpointing = setting(
        "auto",
        "Less memory for more time. auto: as little as the memory allows; selective: about half the memory for "
        "little time; on: least memory, steps take a third longer.",
    )
    images_per_pass: int = setting(
        0,
        "Images that go through the UNet at once, at most batch_size; the update stays the same. 0: as many as fit.",
        low=0,
        high=256,
        group="memory",
    )
    memory_limit_gb: float = setting(
        0.0,
        "The run is planned for this much memory; for where other programs will need some. 0: all that is free.",
        low=0,
        high=4096,
        step=0.5,
        group="memory",
    )
    deterministic: bool = setting(
        False,
        "The same bits on a GPU every time, at some cost in speed, to repeat or compare runs there. On the CPU they "
        "always are.",
        group="memory",
    )


def check_memory(settings: MemorySettings) -> None:
    if settings.images_per_pass > settings.batch_size:
        raise ValueError(
            f"images_per_pass is {settings.images_per_pass} and batch_size is {settings.batch_size}: a pass holds a "
            "batch at most, so lower it, or raise batch_size"
        )
