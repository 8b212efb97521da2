"""A ControlNet with its hint images and settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..files import array_sha256
from ..images.crop import fit_image
from .config import CONTROL_TYPES, ControlConfig
from .control_net import ControlNet, describe_control_net

HintNumbers = tuple[int, ...]  # for one image, the index of its hint in each control


@dataclass(frozen=True, eq=False)
class Control:
    """A ControlNet with its hints: images of edges, depth and so on, uint8 [H, W, 3], one in all or one per image.

    Hints are scaled to cover the image and cropped to the centre. Raises ValueError without a hint, and for a
    control_type that does not fit the ControlNet.
    """

    net: ControlNet
    hints: tuple[np.ndarray, ...]
    config: ControlConfig = ControlConfig()

    def __post_init__(self) -> None:
        if not self.hints:
            raise ValueError(f"ControlNet {self.net.name} has no image: connect one")
        _require_type(self.net, self.config.control_type)

    def key(self, number: int, width: int, height: int) -> dict[str, Any]:
        """The part of the cache key of an image of that size with hint `number`."""
        return {
            "net": self.net.sha256,
            "hint": array_sha256(fit_image(self.hints[number], width, height)),
            "strength": float(self.config.strength),
            "interval": [float(self.config.start_percent), float(self.config.end_percent)],
            "type": self.config.control_type,
        }


def describe_control(control: Control) -> str:
    """Two lines of text: the ControlNet, and when and how strongly it acts."""
    config, images = control.config, len(control.hints)
    height, width = control.hints[0].shape[:2]
    acts = (
        f"strength {config.strength:g} from {config.start_percent:.0%} to {config.end_percent:.0%} of the way, by "
        f"{images} image{'s' * (images != 1)} of {width}x{height}"
    )
    return f"{describe_control_net(control.net)}\n{acts}"


def active_controls(controls: Sequence[Control]) -> tuple[Control, ...]:
    return tuple(control for control in controls if control.config.strength)


def type_index(config: ControlConfig) -> int:
    """The index of the control_type in a ControlNet-Union."""
    return CONTROL_TYPES.index(config.control_type) - 1  # auto comes first and has no index


def _require_type(net: ControlNet, control_type: str) -> None:
    known = CONTROL_TYPES[1 : 1 + net.control_types]
    if not known and control_type != "auto":
        raise ValueError(
            f"control_type is {control_type!r}, but ControlNet {net.name} is not a ControlNet-Union: set it to auto"
        )
    if known and control_type not in known:
        raise ValueError(
            f"control_type is {control_type!r}, but ControlNet-Union {net.name} has {', '.join(known)}: choose the "
            "kind of the image"
        )
