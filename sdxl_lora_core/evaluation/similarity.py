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
from ..vision.image_text import unit_vectors
from ..vision.model_folder import OnImages, load_processor
from .clip_score import rank, rounded
from .copies import LEAST_HELD_OUT, Copies, CopyDetector
from .perceptual import perceptual_diversity
from .references import References


@dataclass(frozen=True)
class SimilarityReport:
    """Similarities of images, by the features of `model`.

    `to_references`: for each image the mean cosine with all references (CLIP-I and DINO of DreamBooth,
    arXiv:2208.12242, section 4), empty without references.
    `diversity`: the mean of 1 - cosine over all pairs of the images, NaN for a single one.
    `copies`: for each image its nearest training image, and whether it was memorised; None without training images.
    `lpips`: the mean LPIPS distance over pairs of images; None without its weights.
    """

    model: str
    images: int
    to_references: tuple[float, ...] = ()
    diversity: float = float("nan")
    copies: Copies | None = None
    lpips: float | None = None

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
        for row, near in zip(rows, self.copies.nearest if self.copies else (), strict=False):
            row["nearest"] = training_names[near.index]
            row["correlation"] = rounded(near.correlation)
            row["memorised"] = near.memorised
        return rows

    def as_json(self, training_names: Sequence[str]) -> dict[str, Any]:
        return {
            "model": self.model,
            "images": self.images,
            "mean_similarity": rounded(self.mean),
            "diversity": rounded(self.diversity),
            "lpips_diversity": self.lpips,
            "memorised": self.copies.count if self.copies else None,
            "memorisation_threshold": self.copies.threshold if self.copies else None,
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
        return [*found, self._copies_in_words()] if self.copies else found

    def _copies_in_words(self) -> str:
        assert self.copies
        if self.copies.threshold is None:
            return (
                f"Not known whether images were memorised: hold out at least {LEAST_HELD_OUT} images, which show how "
                "near to the training images one may be."
            )
        return (
            f"{self.copies.count} of {self.images} images are nearer to a training image than any held-out image "
            f"(correlation {self.copies.threshold:.3f}): memorised, unless their prompts describe that image."
        )


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


def compare_images(images: Sequence[np.ndarray], features: Features, found: References) -> SimilarityReport:
    """Compares images (uint8 [H, W, 3]) with held-out references and with the images that were trained on.

    Both may be empty. Raises ValueError if there is no image.
    """
    if not len(images):
        raise ValueError("there are 0 images to compare: give at least one")
    own = features.unit(images)
    references = features.unit(found.held_out) if len(found.held_out) else None
    return SimilarityReport(
        model=features.name,
        images=len(images),
        to_references=tuple((own @ references.T).mean(1).tolist()) if references is not None else (),
        diversity=diversity(own),
        copies=CopyDetector(found).find(images) if len(found.training) else None,
        lpips=perceptual_diversity(images),
    )


def diversity(features: Tensor) -> float:
    """The mean of 1 - cosine over all pairs of unit vectors [N, D]: 0 for equal images. NaN for a single one."""
    count = len(features)
    if count < 2:
        return float("nan")
    cosines = (features @ features.T).double()
    return float(1 - (cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1)))
