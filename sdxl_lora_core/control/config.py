"""The settings of a ControlNet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ..settings import Range, check_settings, setting

# In the order of ControlNet-Union's indices, with ComfyUI's names; auto is for nets that take one kind of image.
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
    """How strongly and when a ControlNet acts. Percents are fractions from 0 (noise) to 1 (image), as in ComfyUI."""

    strength: float = setting(
        1.0, "How strongly it acts. 0 turns it off, at no cost.", Range(0.0, 10.0, step=0.01, rounded=True)
    )
    start_percent: float = setting(
        0.0,
        "The position between noise (0) and image (1) from which it acts, as in ComfyUI's Apply ControlNet.",
        Range(0.0, 1.0, step=0.001, rounded=True),
    )
    end_percent: float = setting(
        1.0,
        "The position up to which it acts. About 0.5 leaves the details free and saves time.",
        Range(0.0, 1.0, step=0.001, rounded=True),
    )
    control_type: ControlType = setting(
        "auto",
        "The kind of image, for a ControlNet-Union, which accepts several. auto: for all other ControlNets.",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.start_percent >= self.end_percent:
            raise ValueError(
                f"start_percent is {self.start_percent:g} and end_percent {self.end_percent:g}: the start must be "
                "lower; to turn the ControlNet off, set strength to 0"
            )
