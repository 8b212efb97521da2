"""Distances between two sets of images, by their features: CMMD, KID, FID; and the Inception Score of one set."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from .statistics import Interval, t_interval

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
KID_SUBSET = 100
_LEAST_PARTS = 4
FID_ENOUGH = 10_000
_BLOCK = 1024  # rows of a kernel matrix in memory at once


@dataclass(frozen=True)
class DistributionReport:
    """Distances of two sets of images by the features of `model`; lower is nearer.

    `cmmd`: Jayasumana et al., arXiv:2401.09603, with the biased estimator of its code. `kid`: Binkowski et al.,
    arXiv:1801.01401, with an interval over subsets. `fid`: Heusel et al., arXiv:1706.08500. Values of different models
    cannot be compared.
    """

    model: str
    images: int
    references: int
    cmmd: float
    kid: float
    kid_interval: Interval
    fid: float
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "images": self.images,
            "references": self.references,
            "cmmd": self.cmmd,
            "kid": self.kid,
            "kid_interval": self.kid_interval.as_json(),
            "fid": self.fid,
            "warnings": list(self.warnings),
        }

    def sentences(self) -> list[str]:
        interval = "" if math.isnan(self.kid_interval.low) else f" ({self.kid_interval})"
        return [
            f"{self.images} images against {self.references} references, by {self.model}; lower is nearer.",
            f"CMMD {self.cmmd:.3f}",
            f"KID {self.kid:.4g}{interval}",
            f"FID {self.fid:.4g}",
            *self.warnings,
        ]


def compare_distributions(images: Tensor, references: Tensor, model: str) -> DistributionReport:
    """Compares features [N, D] and [M, D], not normalised. Raises ValueError unless both sets have two images."""
    ours, theirs = (features.double().numpy() for features in (images, references))
    if min(len(ours), len(theirs)) < 2:
        raise ValueError(
            f"there are {len(ours)} images and {len(theirs)} reference images: a distribution needs at least 2 of each"
        )
    kid, interval = kernel_distance(ours, theirs)
    return DistributionReport(
        model=model,
        images=len(ours),
        references=len(theirs),
        cmmd=cmmd(ours, theirs),
        kid=kid,
        kid_interval=interval,
        fid=frechet_distance(ours, theirs),
        warnings=_warnings(len(ours), ours.shape[1], len(theirs)),
    )


def cmmd(first: np.ndarray, second: np.ndarray) -> float:
    """1000 times the squared MMD of unit vectors with a Gaussian kernel of sigma 10 (arXiv:2401.09603, section 3).

    The biased estimator, as in the paper's code: 0 for equal sets. Vectors [N, D] and [M, D] are normalised first.
    """
    first, second = _unit(first), _unit(second)
    within, across = _mean_gaussian(first, first) + _mean_gaussian(second, second), _mean_gaussian(first, second)
    return float(CMMD_SCALE * max(within - 2 * across, 0.0))


def kernel_distance(first: np.ndarray, second: np.ndarray, seed: int = 0) -> tuple[float, Interval]:
    """KID: the unbiased squared MMD with the kernel (x.y / D + 1)^3, of all features [N, D] and [M, D] (eq. 4).

    The interval is a t interval over random disjoint parts of about KID_SUBSET features, at least four parts where the
    sets are large enough, and NaN for sets of fewer than four. The value may be below 0.
    """
    least = min(len(first), len(second))
    parts = min(max(least // KID_SUBSET, _LEAST_PARTS), least // 2)
    order = np.random.default_rng(seed)
    mixed = [values[order.permutation(len(values))] for values in (first, second)]
    splits = zip(np.array_split(mixed[0], parts), np.array_split(mixed[1], parts), strict=True)
    return _unbiased_mmd(first, second), t_interval(np.array([_unbiased_mmd(a, b) for a, b in splits]))


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of features [N, D] and [M, D], with covariances over n - 1.

    The trace of the root is the sum of the singular values of S1^T S2 with Ci = Si Si^T, which needs no root of a
    matrix and is exact where a covariance is singular, as with fewer images than dimensions.
    """
    means = first.mean(0) - second.mean(0)
    centred = [(values - values.mean(0)) / np.sqrt(len(values) - 1) for values in (first, second)]
    root = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    traces = sum(float((values**2).sum()) for values in centred)
    return float(max(means @ means + traces - 2 * root, 0.0))


def inception_score(logits: Tensor) -> float:
    """exp of the mean KL divergence of the classes of each image from those of all (Salimans et al., arXiv:1606.03498).

    `logits` [N, classes]; 1 to the number of classes, higher is better.
    """
    logs = logits.double().log_softmax(1)
    shares = logs.exp()
    mean = shares.mean(0, keepdim=True)
    return float((shares * (logs - mean.clamp_min(1e-300).log())).sum(1).mean().exp())


def _mean_gaussian(first: np.ndarray, second: np.ndarray) -> float:
    total = 0.0
    for start in range(0, len(first), _BLOCK):
        squares = 2 - 2 * first[start : start + _BLOCK] @ second.T  # of distances between unit vectors
        total += np.exp(-np.maximum(squares, 0) / (2 * CMMD_SIGMA**2)).sum()
    return total / (len(first) * len(second))


def _unbiased_mmd(first: np.ndarray, second: np.ndarray) -> float:
    return _mean_cubic(first, None) + _mean_cubic(second, None) - 2 * _mean_cubic(first, second)


def _mean_cubic(first: np.ndarray, second: np.ndarray | None) -> float:
    """The mean of the kernel over all pairs; within one set without each with itself."""
    other = first if second is None else second
    total = 0.0
    for start in range(0, len(first), _BLOCK):
        total += _cubic(first[start : start + _BLOCK] @ other.T, first.shape[1]).sum()
    if second is not None:
        return total / (len(first) * len(second))
    alone = _cubic((first**2).sum(1), first.shape[1]).sum()
    return (total - alone) / (len(first) * (len(first) - 1))


def _cubic(products: np.ndarray, dimensions: int) -> np.ndarray:
    return (products / dimensions + 1) ** 3


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _warnings(images: int, dimensions: int, references: int) -> tuple[str, ...]:
    least, found = min(images, references), []
    if least < FID_ENOUGH:
        found.append(
            f"FID of {least} images is too high by an unknown amount (it needs about {FID_ENOUGH}): compare CMMD or "
            "KID instead"
        )
    if least <= dimensions:
        found.append(f"FID: {least} images do not determine a covariance of {dimensions} features")
    return tuple(found)
