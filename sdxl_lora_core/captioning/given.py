"""Captions from elsewhere, such as another node of a graph, with the images that they were written for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..dataset.folder_files import ImageFile
from ..images.crop import fit_image
from ..images.decode import open_image
from ..images.likeness import pixel_vectors
from .folder_captions import FolderCaptions

_ALIKE = 0.9  # correlation of the pixels of one image in two sizes
_SIDE = 128  # pixels

OnImages = Callable[[int, int], object]


@dataclass(frozen=True)
class GivenCaptions:
    """Captions by image key; an image without one gets none."""

    texts: Mapping[str, str]
    name: str = "connected captions"

    def open(self) -> None:
        """Nothing is to be loaded."""

    def captions(self, keys: Sequence[str], images: Sequence[np.ndarray]) -> list[str]:
        return [self.texts.get(key, "") for key in keys]


def given_captions(
    folder: Path,
    texts: Sequence[str],
    images: Sequence[np.ndarray] | None = None,
    on_images: OnImages = lambda done, total: None,
) -> GivenCaptions:
    """Captions for the images of a folder: in its order, or for the given `images` (uint8 [H, W, 3]).

    A single text for several images has a line for each.

    A given image is an image of the folder in any size, or the center of one. `on_images(done, total)` is called for
    each image of the folder that is looked at, and may raise to cancel. Raises ValueError if the numbers differ, or for
    an image that is not in the folder.
    """
    known = FolderCaptions.read(folder).images
    expected = len(known) if images is None else len(images)
    if len(texts) == 1 and expected > 1:
        texts = _lines(texts[0], expected)
    if len(texts) != expected:
        where = f"{folder.name!r} has {expected} images" if images is None else f"there are {expected} images"
        raise ValueError(
            f"captions has {len(texts)} captions and {where}: connect one for each"
            + (", with the images they were written for" if images is None else "")
        )
    keys = list(known) if images is None else _matches(folder.name, list(known.values()), images, on_images)
    return GivenCaptions(dict(zip(keys, texts, strict=True)))


def _lines(text: str, expected: int) -> list[str]:
    lines = text.split("\n")
    return lines[:-1] if len(lines) == expected + 1 and not lines[-1] else lines  # the last line's end


def _matches(folder: str, known: Sequence[ImageFile], images: Sequence[np.ndarray], on_images: OnImages) -> list[str]:
    """The key of each given image among those of a folder, each once. Raises ValueError for one that is not there."""
    from scipy.optimize import linear_sum_assignment

    sizes = [_small_size(image) for image in images]
    vectors = pixel_vectors(images)
    likeness = np.full((len(images), len(known)), -1.0)
    for number, image in enumerate(known):
        on_images(number, len(known))
        for pixels in _looks(image.path):
            fitted = {size: fit_image(pixels, *size) for size in dict.fromkeys(sizes)}
            of_size = dict(zip(fitted, pixel_vectors(list(fitted.values())), strict=True))
            found = [float(vector @ of_size[size]) for vector, size in zip(vectors, sizes, strict=True)]
            likeness[:, number] = np.maximum(likeness[:, number], found)
    rows, columns = linear_sum_assignment(likeness, maximize=True)
    pairs = dict(zip(rows.tolist(), columns.tolist(), strict=True))
    for number in range(len(images)):
        if number not in pairs or likeness[number, pairs[number]] < _ALIKE:
            raise ValueError(
                f"image {number + 1} of images is not in the folder {folder!r}: connect the images of that folder"
            )
    return [known[pairs[number]].key for number in range(len(images))]


def _small_size(image: np.ndarray) -> tuple[int, int]:
    """Width and height in the image's aspect ratio with a longer side of 128 px: sizes of one shape are one."""
    height, width = image.shape[:2]
    scale = _SIDE / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _looks(path: Path) -> Iterator[np.ndarray]:
    """What other nodes may have seen of an image, small: transparent parts on white, or as the colours beneath."""
    try:
        yield _shrunk(open_image(path))
        with Image.open(path) as raw:
            if "A" in raw.getbands() or "transparency" in raw.info:
                yield _shrunk(ImageOps.exif_transpose(raw).convert("RGB"))
    except (OSError, ValueError):
        return  # which is reported when it is captioned


def _shrunk(image: Image.Image) -> np.ndarray:
    image.thumbnail((2 * _SIDE, 2 * _SIDE))
    return np.asarray(image)
