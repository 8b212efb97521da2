"""Positions within the base's noise schedule, and intervals of them."""

from __future__ import annotations


def progress_of(timestep: float, levels: int) -> float:
    """The position of a timestep between the noisiest of the training's `levels` (0) and the cleanest (1)."""
    return 1 - timestep / (levels - 1)


def is_within(progress: float, start: float, end: float) -> bool:
    """Whether `progress` lies in the closed interval. Rounding never excludes anything at the bounds 0 and 1."""
    return (start == 0 or start <= progress) and (end == 1 or progress <= end)
