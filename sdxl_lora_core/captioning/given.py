"""Captions from elsewhere, such as another node of a graph, with the images that they were written for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..images.crop import fit_image
from ..images.decode import open_image
from ..images.likeness import pixel_vectors
from .folder_captions import FolderCaptions

_ALIKE = 0.9  # correlation of the pixels of one image in two sizes


@dataclass(frozen=True)
class GivenCaptions:
    """Captions by image key; an image without one gets none."""

    texts: Mapping[str, str]
    name: str = "connected captions"

    def open(self) -> None:
        """Nothing is to be loaded."""

    def captions(self, keys: Sequence[str], images: Sequence[np.ndarray]) -> list[str]:
        return [self.texts.get(key, "") for key in keys]


def given_captions(folder: Path, texts: Sequence[str], images: Sequence[np.ndarray] | None = None) -> GivenCaptions:
    """Captions for the images of a folder: in its order, or for the given `images` (uint8 [H, W, 3]).

    A given image is an image of the folder in any size, or the center of one. Raises ValueError if the numbers differ,
    or for an image that is not in the folder.
    """
    keys = list(FolderCaptions.read(folder).images)
    expected = len(keys) if images is None else len(images)
    if len(texts) != expected:
        where = f"{folder.name!r} has {expected} images" if images is None else f"there are {expected} images"
        raise ValueError(
            f"captions has {len(texts)} captions and {where}: connect one for each"
            + (", with the images they were written for" if images is None else "")
        )
    found = keys if images is None else match_images(folder, keys, images)
    return GivenCaptions(dict(zip(found, texts, strict=True)))


def match_images(folder: Path, keys: Sequence[str], images: Sequence[np.ndarray]) -> list[str]:
    """The key of each given image among those of a folder, each once. Raises ValueError for one that is not there."""
    from scipy.optimize import linear_sum_assignment

    shapes = [image.shape[:2] for image in images]
    vectors = pixel_vectors(images)
    likeness = np.full((len(images), len(keys)), -1.0)
    for number, key in enumerate(keys):
        try:
            pixels = np.asarray(open_image(folder / key))
        except (OSError, ValueError):
            continue  # which is reported when it is captioned
        known = {shape: fit_image(pixels, shape[1], shape[0]) for shape in dict.fromkeys(shapes)}
        of_shape = dict(zip(known, pixel_vectors(list(known.values())), strict=True))
        likeness[:, number] = [vector @ of_shape[shape] for vector, shape in zip(vectors, shapes, strict=True)]
    rows, columns = linear_sum_assignment(likeness, maximize=True)
    pairs = dict(zip(rows.tolist(), columns.tolist(), strict=True))
    for number in range(len(images)):
        if number not in pairs or likeness[number, pairs[number]] < _ALIKE:
            raise ValueError(
                f"image {number + 1} of images is not in the folder {folder.name!r}: connect the images of that folder"
            )
    return [str(keys[pairs[number]]) for number in range(len(images))]
