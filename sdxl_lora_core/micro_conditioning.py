"""What SDXL is told about the picture that it draws: how large the original was, and where it was cut.

Source: Podell et al., SDXL (arXiv 2307.01952), section 2.2.
"""

from __future__ import annotations

from .config import GenerateConfig
from .sdxl.micro_conditioning import MicroConditioning


def micro_conditioning(config: GenerateConfig) -> MicroConditioning:
    """What a request asks for. A size of 0 is the image's own."""
    return MicroConditioning(
        (config.original_height or config.height, config.original_width or config.width),
        (config.crop_top, config.crop_left),
        (config.target_height or config.height, config.target_width or config.width),
    )


def is_own_size(config: GenerateConfig) -> bool:
    """Whether the model is told of a picture of the image's size that nothing was cut from: the usual case."""
    own = (config.height, config.width)
    return micro_conditioning(config) == MicroConditioning(own, (0, 0), own)
