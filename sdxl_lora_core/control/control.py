"""What steers an image by pictures: ControlNets, each with its hints and settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..files import array_sha256
from ..images.crop import fit_image
from .config import CONTROL_TYPES, ControlConfig
from .control_net import ControlNet

HintNumbers = tuple[int, ...]  # for one image, which of each control's hints is its own


@dataclass(frozen=True, eq=False)
class Control:
    """A ControlNet at work. `hints` are pictures of what it reads (edges, depth, ...), uint8 [H, W, 3]: one for all
    images or one for each. They are scaled to cover the image and cut in the middle when it is made.

    Raises ValueError without a hint, and for a control_type that the ControlNet does not have or lacks.
    """

    net: ControlNet
    hints: tuple[np.ndarray, ...]
    config: ControlConfig = ControlConfig()

    def __post_init__(self) -> None:
        if not self.hints:
            raise ValueError(f"ControlNet {self.net.name} has no image to steer by: connect one")
        _require_type(self.net, self.config.control_type)

    def key(self, number: int, width: int, height: int) -> dict[str, Any]:
        """For the key of a cached image of that size, made with hint `number`: all that decides its pixels."""
        return {
            "net": self.net.sha256,
            "hint": array_sha256(fit_image(self.hints[number], width, height)),
            "strength": float(self.config.strength),
            "interval": [float(self.config.start_percent), float(self.config.end_percent)],
            "type": self.config.control_type,
        }


def active_controls(controls: Sequence[Control]) -> tuple[Control, ...]:
    return tuple(control for control in controls if control.config.strength)


def type_index(config: ControlConfig) -> int:
    """The number of the control_type in a ControlNet-Union."""
    return CONTROL_TYPES.index(config.control_type) - 1  # auto, which comes first, is none of them


def _require_type(net: ControlNet, control_type: str) -> None:
    known = CONTROL_TYPES[1 : 1 + net.control_types]
    if not known and control_type != "auto":
        raise ValueError(
            f"control_type is {control_type!r}, but ControlNet {net.name} is no ControlNet-Union: set it to auto"
        )
    if known and control_type not in known:
        raise ValueError(
            f"control_type is {control_type!r}, but ControlNet-Union {net.name} knows {', '.join(known)}: choose what "
            "the image shows"
        )
