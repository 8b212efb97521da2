"""How alike images are by their pixels, and how sharp they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

_SIDE = 32  # pixels: what survives another size, compression, and small changes
_SHARP_SIDE = 512  # pixels of the longer side at which sharpness is measured


def pixel_vectors(images: Sequence[np.ndarray]) -> np.ndarray:
    """Pixels at 32 x 32 without their mean, of length 1, so that products are correlations. float64 [N, 3072].

    `images` are uint8 [H, W, 3]. A plain image has no correlation with any.
    """
    vectors = np.zeros((len(images), 3 * _SIDE**2))
    for number in range(len(images)):
        small = Image.fromarray(images[number]).resize((_SIDE, _SIDE), Image.Resampling.BOX)
        values = np.asarray(small, dtype=np.float64).ravel()
        values -= values.mean()
        vectors[number] = values / (np.linalg.norm(values) or 1.0)
    return vectors


def sharpness(image: np.ndarray) -> float:
    """The variance of the Laplacian of the brightness, at 512 px: small for a blurred image.

    Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy", 2000.

    An image that is smaller is measured as it is. Plain areas lower it as well, so compare images of one kind.
    """
    picture = Image.fromarray(image).convert("L")
    if max(picture.size) > _SHARP_SIDE:
        picture.thumbnail((_SHARP_SIDE, _SHARP_SIDE), Image.Resampling.LANCZOS)
    values = np.asarray(picture, dtype=np.float64)
    inner = values[1:-1, 1:-1]
    laplacian = values[:-2, 1:-1] + values[2:, 1:-1] + values[1:-1, :-2] + values[1:-1, 2:] - 4 * inner
    return float(laplacian.var()) if laplacian.size else 0.0
