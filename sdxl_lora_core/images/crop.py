"""Resizing and cropping of images to a given size."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from ..hashed_random import random_index

Bucket = tuple[int, int]


@dataclass(frozen=True)
class Crop:
    """Resize to resized_w x resized_h, then crop bucket_w x bucket_h at (left, top). All in pixels."""

    resized_w: int
    resized_h: int
    left: int
    top: int
    bucket_w: int
    bucket_h: int


def center_crop(width: int, height: int, bucket: Bucket) -> Crop:
    """The smallest resize that covers the bucket (it enlarges small images) and the crop at its center."""
    bucket_w, bucket_h = bucket
    if width * bucket_h >= height * bucket_w:
        resized_w, resized_h = _divide_rounded(width * bucket_h, height), bucket_h
    else:
        resized_w, resized_h = bucket_w, _divide_rounded(height * bucket_w, width)
    return Crop(resized_w, resized_h, (resized_w - bucket_w) // 2, (resized_h - bucket_h) // 2, bucket_w, bucket_h)


def random_crop(width: int, height: int, bucket: Bucket, *key: object) -> Crop:
    """The resize of center_crop, and a crop at a uniformly random position that depends on `key` only."""
    crop = center_crop(width, height, bucket)
    left = random_index(crop.resized_w - crop.bucket_w + 1, *key, "left")
    top = random_index(crop.resized_h - crop.bucket_h + 1, *key, "top")
    return replace(crop, left=left, top=top)


def _divide_rounded(a: int, b: int) -> int:
    return (2 * a + b) // (2 * b)


def crop_to_bucket(image: Image.Image, crop: Crop) -> Image.Image:
    """Resizes (Lanczos) and crops in one step.

    Only the pixels of the crop are computed: resizing first would need gigabytes for a very long, thin image.
    """
    scale_x, scale_y = image.width / crop.resized_w, image.height / crop.resized_h
    box = (
        crop.left * scale_x,
        crop.top * scale_y,
        min((crop.left + crop.bucket_w) * scale_x, image.width),
        min((crop.top + crop.bucket_h) * scale_y, image.height),
    )
    return image.resize((crop.bucket_w, crop.bucket_h), Image.Resampling.LANCZOS, box=box)


def fit_image(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Scales uint8 [H, W, ...] to cover width x height px (Lanczos) and crops the center, unless it has that size."""
    found_height, found_width = pixels.shape[:2]
    if (found_width, found_height) == (width, height):
        return pixels
    scale = max(width / found_width, height / found_height)
    resized_w, resized_h = max(width, round(found_width * scale)), max(height, round(found_height * scale))
    crop = Crop(resized_w, resized_h, (resized_w - width) // 2, (resized_h - height) // 2, width, height)
    return np.asarray(crop_to_bucket(Image.fromarray(pixels), crop))
