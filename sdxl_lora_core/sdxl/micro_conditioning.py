"""What SDXL is told about the picture that it draws: how large the original was, and where it was cut.

Source: Podell et al., SDXL (arXiv 2307.01952), section 2.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..images.crop import Crop


class MicroConditioning(NamedTuple):
    """In pixels, height and top first. The fields are named as the arguments of diffusers' pipelines."""

    original_size: tuple[int, int]
    crops_coords_top_left: tuple[int, int]
    target_size: tuple[int, int]


def time_ids(original: tuple[int, int], crop: Crop, mirrored: bool) -> Tensor:
    """SDXL's micro-conditioning, float32 [6]: original h, w, crop top, left, target h, w (all in pixels, h first).

    float32, because bfloat16 holds whole numbers only up to 256. Source: arXiv 2307.01952, section 2.2.
    """
    width, height = original
    left = crop.resized_w - crop.bucket_w - crop.left if mirrored else crop.left
    return torch.tensor([height, width, crop.top, left, crop.bucket_h, crop.bucket_w], dtype=torch.float32)
