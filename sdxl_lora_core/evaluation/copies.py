"""Finds images that are copies of training images: memorisation (Carlini et al., arXiv:2301.13188)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..images.likeness import pixel_vectors
from .references import References

LEAST_HELD_OUT = 2  # images from which a threshold is taken
UNLIKELY = 0.01  # the probability below which a set of images counts as memorised


@dataclass(frozen=True)
class Nearest:
    """The training image nearest to an image, by its index, with the correlation of their pixels.

    `memorised`: nearer than any held-out image is to its own nearest training image.
    """

    index: int
    correlation: float
    memorised: bool


@dataclass(frozen=True)
class Copies:
    """For each image the nearest training image. `threshold` is the correlation from which an image counts as
    memorised; None if too few images are held out to tell."""

    nearest: tuple[Nearest, ...]
    threshold: float | None

    @property
    def count(self) -> int:
        """The number of memorised images."""
        return sum(near.memorised for near in self.nearest)


class CopyDetector:
    """Compares images with the training images of `found`, by the correlation of their pixels at 32 x 32.

    Not by a model: to a model two images of the same subject are near, although none is a copy. Training images count
    as they are and mirrored.
    """

    def __init__(self, found: References) -> None:
        self._training = pixel_vectors(found.training)
        self._mirrored = pixel_vectors([pixels[:, ::-1] for pixels in found.training])
        self.threshold: float | None = None
        if len(found.held_out) >= LEAST_HELD_OUT:
            self.threshold = float(self._correlations(found.held_out).max())

    def find(self, images: Sequence[np.ndarray]) -> Copies:
        """The nearest training image of each of `images`, uint8 [H, W, 3]."""
        correlations = self._correlations(images)
        nearest = [
            Nearest(
                int(row.argmax()), float(row.max()), self.threshold is not None and bool(row.max() > self.threshold)
            )
            for row in correlations
        ]
        return Copies(tuple(nearest), self.threshold)

    def _correlations(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """[images, training]"""
        vectors = pixel_vectors(images)
        return np.maximum(vectors @ self._training.T, vectors @ self._mirrored.T)


def copies_more_than(copies: Copies, baseline: Copies) -> float:
    """The probability that so many more images than of the baseline are memorised by chance: a one-sided sign test of
    the pairs of equal prompt and seed (Dixon and Mood, 1946).

    The baseline has not seen the training images, so what its images have in common with them comes from the prompts.
    """
    from scipy.stats import binomtest

    pairs = list(zip(copies.nearest, baseline.nearest, strict=True))
    more = sum(ours.memorised and not theirs.memorised for ours, theirs in pairs)
    fewer = sum(theirs.memorised and not ours.memorised for ours, theirs in pairs)
    return float(binomtest(more, more + fewer, alternative="greater").pvalue) if more + fewer else 1.0
