"""Plans how a run fits into memory: checkpointing, images per pass, format of the base's weights, offloaded blocks.

The plan is made before the weights are loaded, from the bytes that a step takes by the count of memory_measure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..config.memory import Checkpointing, MemorySettings, WeightFormat

RESERVE = 512 * 2**20  # bytes for the workspaces of libraries
_OVERHEAD = 1.05  # factor on the bytes of a step, because an allocator cannot use all of its memory

# Estimated durations relative to a step that recomputes nothing, from the operations of SDXL at 1024x1024: forward 6.8
# of 14.7 TFLOP, the feed-forward layers' first half 1.9.
_RECOMPUTED = {"off": 1.0, "selective": 1.13, "on": 1.46}
_DEQUANTISED = 1.08  # each weight is read once more
_TRANSFERRED = 0.5  # of all weights over PCIe, twice; blocks between the offloaded ones hide a part of it
_SMALLER_PASS = 1.02  # for each halving


@dataclass(frozen=True)
class MemoryPlan:
    """How a run uses memory. `needed` is in bytes; `tight` says that it may not fit nevertheless."""

    checkpointing: Checkpointing
    images_per_pass: int
    base_weights: WeightFormat
    offloaded_blocks: int
    needed: int
    tight: bool = False

    def reason(self, free: float) -> str:
        """A sentence for the report."""
        room = "an unknown amount of memory" if math.isinf(free) else f"{free / 1e9:.1f} GB free"
        weights = "" if self.base_weights == "full" else f"base weights {self.base_weights}, "
        offloaded = f"{self.offloaded_blocks} blocks offloaded, " if self.offloaded_blocks else ""
        return (
            f"gradient checkpointing {self.checkpointing}, {weights}{offloaded}{self.images_per_pass} images a pass: "
            f"about {self.needed / 1e9:.1f} GB needed of {room}"
        )


class Measured(Protocol):
    """The bytes of a run on the device (see memory_measure)."""

    @property
    def blocks(self) -> int: ...

    def resting(self, weights: WeightFormat, offloaded: int) -> int:
        """Between the passes: weights, trained parameters, their gradients, moments and averages."""
        ...

    def step(self, checkpointing: Checkpointing, images: int) -> int:
        """What a forward and backward pass adds at its peak."""
        ...


def plan_memory(measured: Measured, settings: MemorySettings, free: float, least: bool = False) -> MemoryPlan:
    """The plan of the shortest estimated step among those that fit into `free` bytes; the smallest one if none does.

    Only what a setting leaves to the plan is chosen. `least` asks for the smallest plan in any case.
    """
    chosen: MemoryPlan | None = None
    shortest = math.inf
    candidates = sorted(_candidates(settings), key=lambda candidate: _seconds(*candidate, 0))
    for candidate in [] if least else candidates:
        if _seconds(*candidate, 0) >= shortest:
            break  # offloading only makes it longer
        for offloaded in _offloads(settings, measured.blocks):
            plan = _plan(measured, candidate, offloaded)
            if plan.needed <= free:
                seconds = _seconds(*candidate, offloaded / measured.blocks)
                if seconds < shortest:
                    chosen, shortest = plan, seconds
                break
    if chosen:
        return chosen
    most = max(_offloads(settings, measured.blocks))
    smallest = min((_plan(measured, candidate, most) for candidate in candidates), key=lambda plan: plan.needed)
    return MemoryPlan(**{**vars(smallest), "tight": smallest.needed > free})


Candidate = tuple[Checkpointing, WeightFormat, int, int]  # with the images of a pass, and of the batch


def _candidates(settings: MemorySettings) -> Iterator[Candidate]:
    requested = settings.gradient_checkpointing
    modes: Sequence[Checkpointing] = ("off", "selective", "on") if requested == "auto" else (requested,)
    weights = settings.base_weights
    formats: Sequence[WeightFormat] = ("full", "int8") if weights == "auto" else (weights,)
    most = settings.images_per_pass or settings.batch_size
    for mode in modes:
        for form in formats:
            images = most
            yield mode, form, images, most
            while images > 1:
                images = (images + 1) // 2
                yield mode, form, images, most


def _offloads(settings: MemorySettings, blocks: int) -> Sequence[int]:
    return range(blocks + 1) if settings.offload_blocks < 0 else [min(settings.offload_blocks, blocks)]


def _seconds(mode: Checkpointing, form: WeightFormat, images: int, most: int, offloaded: float) -> float:
    """The estimated duration of an update, relative to one of the whole batch that saves no memory."""
    smaller = _SMALLER_PASS ** math.log2(most / images)
    dequantised = 1.0 if form == "full" else _DEQUANTISED
    bytes_of = 1.0 if form == "full" else 0.5
    return _RECOMPUTED[mode] * smaller * dequantised + _TRANSFERRED * offloaded * bytes_of * math.ceil(most / images)


def _plan(measured: Measured, candidate: Candidate, offloaded: int) -> MemoryPlan:
    mode, form, images, _ = candidate
    needed = measured.resting(form, offloaded) + _OVERHEAD * measured.step(mode, images) + RESERVE
    return MemoryPlan(mode, images, form, offloaded, int(needed))
