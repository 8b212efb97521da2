"""Held-out images to compare with, and the images that were trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..dataset.caption_dataset import CaptionDataset, CaptionEntry
from ..images.decode import open_image
from ..images.lazy import Lazy
from ..messages import listed

Pixels = Sequence[np.ndarray]


@dataclass(frozen=True)
class References:
    """Images as uint8 [H, W, 3]: those held out of training, and those trained on, with their files' names."""

    held_out: Pixels = ()
    training: Pixels = ()
    training_names: Sequence[str] = field(default=())


def find_references(
    images: Pixels | None, dataset: CaptionDataset | None, trained: Mapping[str, str] | None = None
) -> References:
    """The references of an evaluation: `images`, or else the images that `dataset` holds out (validation_percent).

    `trained` are names of further training images by the SHA-256 of their files, as of the runs of the LoRAs that are
    evaluated. Raises ValueError naming references that were trained on: a LoRA that memorised them would score best. A
    file is known by its content, an image without a file by its pixels.
    """
    entries = dataset.entries if dataset else ()
    if images is None:
        held_out = dataset.validation if dataset else ()
        known = {entry.sha256: entry.image.name for entry in entries} | dict(trained or {})
        _require_held_out([known[entry.sha256] for entry in held_out if entry.sha256 in known])
        images = pictures(held_out)
    elif entries:
        known = {
            _pixel_hash(pixels): entry.image.name for entry, pixels in zip(entries, pictures(entries), strict=True)
        }
        _require_held_out([known[key] for key in map(_pixel_hash, images) if key in known])
    return References(images, pictures(entries), tuple(entry.image.name for entry in entries))


def pictures(entries: Sequence[CaptionEntry]) -> Pixels:
    """The images of entries, each decoded when it is looked at."""
    return Lazy(len(entries), lambda number: np.asarray(open_image(entries[number].image)))


def _pixel_hash(pixels: np.ndarray) -> str:
    return hashlib.sha256(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def _require_held_out(shared: Sequence[str]) -> None:
    if shared:
        raise ValueError(
            f"{len(shared)} of the reference images were trained on: {listed(shared)}. A LoRA that memorised them "
            "would score best: use images that were held out, as validation_percent of Load Caption Dataset does"
        )
