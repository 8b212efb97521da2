"""SDXL's micro-conditioning: the original size, crop position and target size of an image.

Source: Podell et al., SDXL (arXiv 2307.01952), section 2.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..images.crop import Crop


class MicroConditioning(NamedTuple):
    """All in px as (height, width) or (top, left). Fields are named after the arguments of diffusers' pipelines."""

    original_size: tuple[int, int]
    crops_coords_top_left: tuple[int, int]
    target_size: tuple[int, int]


def time_ids(original: tuple[int, int], crop: Crop, mirrored: bool) -> Tensor:
    """The UNet's input, float32 [6]: original h, w, crop top, left, target h, w, all in px.

    float32, because bfloat16 represents integers exactly only up to 256.
    """
    width, height = original
    left = crop.resized_w - crop.bucket_w - crop.left if mirrored else crop.left
    return torch.tensor([height, width, crop.top, left, crop.bucket_h, crop.bucket_w], dtype=torch.float32)
