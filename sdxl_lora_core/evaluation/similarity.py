"""Similarity of images to reference images, diversity of a set, and memorised training images."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..vision.features import image_features, load_encoder
from ..vision.image_text import OnImages, unit_vectors
from ..vision.model_folder import load_processor
from .clip_score import rank, rounded
from .perceptual import perceptual_diversity

LEAST_HELD_OUT = 2  # images from which a threshold of memorisation is taken


@dataclass(frozen=True)
class Nearest:
    """The training image nearest to an image, by its index, with the cosine of both. `memorised`: nearer than any
    held-out image is to its own nearest training image."""

    index: int
    cosine: float
    memorised: bool


@dataclass(frozen=True)
class SimilarityReport:
    """Similarities of images, by the features of `model`.

    `to_references`: for each image the mean cosine with all references (CLIP-I and DINO of DreamBooth,
    arXiv:2208.12242, section 4), empty without references.
    `diversity`: the mean of 1 - cosine over all pairs of the images, NaN for a single one.
    `nearest`: for each image its nearest training image, empty without training images.
    `threshold`: the cosine from which an image counts as memorised; None if too few images are held out to tell.
    `lpips`: the mean LPIPS distance over pairs of images; None without its weights.
    """

    model: str
    images: int
    to_references: tuple[float, ...] = ()
    diversity: float = float("nan")
    nearest: tuple[Nearest, ...] = ()
    threshold: float | None = None
    lpips: float | None = None
    warnings: tuple[str, ...] = ()

    @property
    def memorised(self) -> int:
        """The number of memorised images."""
        return sum(near.memorised for near in self.nearest)

    @property
    def mean(self) -> float:
        """The mean similarity to the references; NaN without references."""
        return statistics.fmean(self.to_references) if self.to_references else math.nan

    @property
    def order(self) -> tuple[int, ...]:
        """Indices of the images, the most similar first; in their order without references."""
        return rank(self.to_references or [0.0] * self.images)

    def rows(self, training_names: Sequence[str]) -> list[dict[str, Any]]:
        """The images as JSON values, in their order."""
        rows: list[dict[str, Any]] = [{"image": index} for index in range(self.images)]
        for row, similarity in zip(rows, self.to_references, strict=False):
            row["similarity"] = rounded(similarity)
        for row, near in zip(rows, self.nearest, strict=False):
            row["nearest"] = training_names[near.index]
            row["cosine"] = rounded(near.cosine)
            row["memorised"] = near.memorised
        return rows

    def as_json(self, training_names: Sequence[str]) -> dict[str, Any]:
        return {
            "model": self.model,
            "images": self.images,
            "mean_similarity": rounded(self.mean),
            "diversity": rounded(self.diversity),
            "lpips_diversity": self.lpips,
            "memorised": self.memorised,
            "memorisation_threshold": self.threshold,
            "warnings": list(self.warnings),
            "rows": self.rows(training_names),
        }

    def sentences(self) -> list[str]:
        found = []
        if self.to_references:
            found.append(f"The mean similarity to the references is {self.mean:.3f} ({self.model}).")
        if not math.isnan(self.diversity):
            found.append(f"Diversity {self.diversity:.3f} (0: all images are equal).")
        if self.lpips is not None:
            found.append(f"LPIPS diversity {self.lpips:.3f}.")
        if self.threshold is not None:
            found.append(
                f"{self.memorised} of {self.images} images look memorised: nearer to a training image than any "
                f"held-out image ({self.threshold:.3f})."
            )
        return [*found, *self.warnings]


class Features:
    """Unit feature vectors of images by one model, which is loaded when it is first needed."""

    def __init__(
        self,
        folder: Path,
        device: torch.device | str = "cpu",
        load: Callable[[Path], torch.nn.Module] = load_encoder,
        on_images: OnImages = lambda done, total: None,
    ) -> None:
        """`load` can return a model that is loaded already. `on_images(done, total)` may raise to cancel."""
        self.folder, self.name = folder, folder.name
        self._device, self._load, self._on_images = device, load, on_images
        self._model: Any = None

    def raw(self, images: Sequence[np.ndarray]) -> Tensor:
        """float32 [N, D], not normalised. `images` are uint8 [H, W, 3]."""
        if self._model is None:
            self._model = self._load(self.folder).to(self._device)
            self._processor = load_processor(self.folder, self._model)
        with torch.inference_mode():
            return image_features(self._model, self._processor, images, self._on_images)

    def unit(self, images: Sequence[np.ndarray]) -> Tensor:
        """float32 [N, D] of length 1."""
        return unit_vectors(self.raw(images))


def compare_images(
    images: Sequence[np.ndarray],
    features: Features,
    references: Sequence[np.ndarray] = (),
    training: Sequence[np.ndarray] = (),
) -> SimilarityReport:
    """Compares images (uint8 [H, W, 3]) with held-out references and with the images that were trained on.

    Both may be empty. References must not have been trained on: see find_references. Raises ValueError if there is no
    image.
    """
    if not len(images):
        raise ValueError("there are 0 images to compare: give at least one")
    own = features.unit(images)
    held_out = features.unit(references) if len(references) else None
    trained = features.unit(training) if len(training) else None
    threshold, warnings = _memorisation(held_out, trained)
    return SimilarityReport(
        model=features.name,
        images=len(images),
        to_references=tuple((own @ held_out.T).mean(1).tolist()) if held_out is not None else (),
        diversity=diversity(own),
        nearest=nearest(own, trained, threshold) if trained is not None else (),
        threshold=threshold,
        lpips=perceptual_diversity(images),
        warnings=warnings,
    )


def diversity(features: Tensor) -> float:
    """The mean of 1 - cosine over all pairs of unit vectors [N, D]: 0 for equal images. NaN for a single one."""
    count = len(features)
    if count < 2:
        return float("nan")
    cosines = (features @ features.T).double()
    return float(1 - (cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1)))


def nearest(features: Tensor, training: Tensor, threshold: float | None) -> tuple[Nearest, ...]:
    """For each unit vector [N, D] the nearest of `training` [M, D]."""
    cosines, indices = (features @ training.T).max(1)
    return tuple(
        Nearest(index, cosine, threshold is not None and cosine > threshold)
        for index, cosine in zip(indices.tolist(), cosines.tolist(), strict=True)
    )


def memorisation_threshold(held_out: Tensor, training: Tensor) -> float:
    """The highest cosine of a held-out image with its nearest training image: so near are images of this subject that
    nobody copied."""
    return float((held_out @ training.T).max())


def _memorisation(held_out: Tensor | None, training: Tensor | None) -> tuple[float | None, tuple[str, ...]]:
    if training is None:
        return None, ()
    if held_out is None or len(held_out) < LEAST_HELD_OUT:
        count = 0 if held_out is None else len(held_out)
        return None, (
            f"{count} held-out images do not show how near an image may be to the training images: hold out "
            f"at least {LEAST_HELD_OUT}, so that memorised images are found",
        )
    return memorisation_threshold(held_out, training), ()
