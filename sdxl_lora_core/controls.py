"""What steers an image by pictures: ControlNets, each with its hints and settings."""

from __future__ import annotations

from collections.abc import Sequence

from .config import GenerateConfig
from .control.control import Control, HintNumbers


def hint_numbers(controls: Sequence[Control], config: GenerateConfig) -> list[HintNumbers]:
    """For each image of the request, in order.

    Raises ValueError unless a control has one hint for all images or one for each.
    """
    wanted = len(config.prompts) * config.count
    for control in controls:
        if len(control.hints) not in (1, wanted):
            raise ValueError(
                f"ControlNet {control.net.name} has {len(control.hints)} images to steer by, but {wanted} images are "
                f"asked for (prompts x count): give 1 for all of them, or {wanted}"
            )
    return [tuple(image % len(control.hints) for control in controls) for image in range(wanted)]
