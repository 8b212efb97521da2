"""How a ControlNet acts, and what it may be told of its picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ..settings import check_choice, check_range

# As a ControlNet-Union numbers them, in ComfyUI's words; auto is for nets that take one kind of picture.
ControlType = Literal[
    "auto",
    "openpose",
    "depth",
    "hed/pidi/scribble/ted",
    "canny/lineart/anime_lineart/mlsd",
    "normal",
    "segment",
    "tile",
    "repaint",
]
CONTROL_TYPES = get_args(ControlType)


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """How a ControlNet acts: from start_percent to end_percent, shares of the way from the noisiest of the base's noise
    levels to the cleanest (ComfyUI's words; 0 to 1). control_type is what the picture shows, for a ControlNet-Union.
    """

    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0

    control_type: ControlType = "auto"

    def __post_init__(self) -> None:
        check_range(self, "strength", 0, 10)
        check_range(self, "start_percent", 0, 1)
        check_range(self, "end_percent", 0, 1)
        check_choice(self, "control_type", CONTROL_TYPES)
        if self.start_percent >= self.end_percent:
            raise ValueError(
                f"start_percent is {self.start_percent:g} and end_percent {self.end_percent:g}: the start comes first; "
                "to turn the ControlNet off, set strength to 0"
            )
