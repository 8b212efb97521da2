"""Images beside the training images that they are nearest to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..images.crop import fit_image
from ..images.lazy import Lazy
from ..images.sheets import text_strip
from .copies import Copies
from .references import References

MOST = 24  # pairs of a sheet, the nearest ones
_TEXT = 14


def nearest_pairs(images: Sequence[np.ndarray], copies: Copies, found: References) -> Sequence[np.ndarray]:
    """For the images nearest to a training image, nearest first, both side by side with their correlation below.

    uint8 [H + strip, 2 W, 3], of at most 24 images; each is made when it is looked at.
    """
    order = sorted(range(len(images)), key=lambda index: -copies.nearest[index].correlation)[:MOST]
    return Lazy(len(order), lambda place: _pair(images[order[place]], copies, order[place], found))


def _pair(image: np.ndarray, copies: Copies, index: int, found: References) -> np.ndarray:
    near = copies.nearest[index]
    height, width = image.shape[:2]
    training = fit_image(found.training[near.index], width, height)
    flag = "  MEMORISED" if near.memorised else ""
    lines = [
        f"image {index + 1}  correlation {near.correlation:.3f}{flag}",
        f"nearest: {found.training_names[near.index]}",
    ]
    strip: Image.Image = text_strip(2 * width, lines, size=max(_TEXT, width // 32))
    return np.concatenate([np.concatenate([image, training], axis=1), np.asarray(strip)])
