"""Distances of two sets of features, against closed forms, numpy and torchmetrics."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from sdxl_lora_core.evaluation.distribution import (
    cmmd,
    compare_distributions,
    frechet_distance,
    inception_score,
    kernel_distance,
)
from sdxl_lora_core.evaluation.similarity import Features
from tests.micro import vision


def features(count: int, dimensions: int = 6, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.normal(shift, 1, (count, dimensions)) @ random.normal(0, 1, (dimensions, dimensions))


def test_cmmd_of_two_orthogonal_points() -> None:
    assert cmmd(np.array([[1.0, 0]] * 3), np.array([[0, 2.0]] * 5)) == pytest.approx(19.900332501663787, abs=1e-6)


def test_cmmd_by_all_pairs() -> None:
    first, second = features(30), features(20, seed=1)
    unit = [values / np.linalg.norm(values, axis=1, keepdims=True) for values in (first, second)]

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([[math.exp(-((x - y) ** 2).sum() / 200) for y in b] for x in a]))

    wanted = 1000 * (mean(unit[0], unit[0]) + mean(unit[1], unit[1]) - 2 * mean(unit[0], unit[1]))
    assert cmmd(first, second) == pytest.approx(wanted, abs=1e-9)
    assert cmmd(first, first) == pytest.approx(0, abs=1e-9)


def test_fid_of_two_point_masses_and_of_diagonal_gaussians() -> None:
    square = np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]) * math.sqrt(3) / 2  # mean 0, covariance 1 over n - 1
    scaled = square * [2, 3] + [5, -1]
    assert frechet_distance(square, scaled) == pytest.approx(5**2 + 1 + (1 - 2) ** 2 + (1 - 3) ** 2, abs=1e-6)
    assert frechet_distance(np.ones((3, 2)), np.zeros((4, 2))) == pytest.approx(2, abs=1e-6)
    assert frechet_distance(scaled, scaled) == pytest.approx(0, abs=1e-6)


def test_fid_by_the_root_of_the_covariances() -> None:
    first, second = features(50), features(40, seed=1, shift=0.5)
    covariances = [np.cov(values, rowvar=False) for values in (first, second)]
    root: Any = sqrtm(covariances[0] @ covariances[1])
    means = first.mean(0) - second.mean(0)
    wanted = means @ means + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.trace(root).real
    assert frechet_distance(first, second) == pytest.approx(wanted, rel=1e-6)


class Extractor(torch.nn.Module):
    """Our features as an extractor of torchmetrics."""

    num_features = 32

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.features = features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.features.raw(list(images.permute(0, 2, 3, 1).numpy()))


def test_fid_and_kid_of_torchmetrics_with_the_same_extractor(tmp_path: Path) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    ours = Features(vision.dinov2(tmp_path / "dino"))
    first, second = vision.pictures(40), [picture // 2 for picture in vision.pictures(40, seed=1)]
    fid = FrechetInceptionDistance(feature=Extractor(ours))
    kid = KernelInceptionDistance(feature=Extractor(ours), subsets=1, subset_size=40)
    for metric in (fid, kid):
        for images, real in ((first, True), (second, False)):
            metric.update(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), real=real)
    report = compare_distributions(ours.raw(first), ours.raw(second), ours.name)
    assert report.fid == pytest.approx(fid.compute().item(), rel=1e-3)
    assert report.kid == pytest.approx(kid.compute()[0].item(), rel=1e-4)


def test_kid_is_unbiased_and_its_interval_covers_no_difference() -> None:
    first, second = features(1000), features(1000, seed=0)
    random = np.random.default_rng(5)
    everything = np.concatenate([first, second])[random.permutation(2000)]
    value, interval = kernel_distance(everything[:1000], everything[1000:])
    assert interval.low < 0 < interval.high and interval.low < value < interval.high
    value, interval = kernel_distance(first, first + 1)
    assert 0 < interval.low < value < interval.high


def test_kid_of_few_images_has_no_interval() -> None:
    assert math.isnan(kernel_distance(features(3), features(3, seed=1))[1].low)
    assert not math.isnan(kernel_distance(features(4), features(4, seed=1))[1].low)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from sdxl_lora_core.evaluation import distribution

    first, second = features(30), features(20, seed=1)
    whole = cmmd(first, second), kernel_distance(first, second)[0]
    monkeypatch.setattr(distribution, "_BLOCK", 7)
    assert (cmmd(first, second), kernel_distance(first, second)[0]) == pytest.approx(whole)


def test_the_inception_score_of_sure_and_of_unsure_classifiers() -> None:
    assert inception_score(torch.eye(4) * 1000) == pytest.approx(4, abs=1e-6)
    assert inception_score(torch.zeros(5, 4)) == pytest.approx(1, abs=1e-6)


def test_a_report_warns_of_fid_and_names_both_counts() -> None:
    report = compare_distributions(torch.from_numpy(features(5)), torch.from_numpy(features(9, seed=1)), "dino")
    assert report.warnings[0].startswith("FID of 5 images is too high") and "5 images do not" in report.warnings[1]
    assert report.sentences()[0] == "5 images against 9 references, by dino; lower is nearer."
    assert report.as_json()["kid_interval"] == report.kid_interval.as_json()
    with pytest.raises(ValueError, match="1 images and 9 reference images"):
        compare_distributions(torch.ones(1, 3), torch.ones(9, 3), "dino")
