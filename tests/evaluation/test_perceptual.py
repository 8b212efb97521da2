"""LPIPS, where its library and weights are installed; tests/comfy has the libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdxl_lora_core.evaluation import perceptual
from sdxl_lora_core.evaluation.perceptual import BACKBONE, is_available, perceptual_diversity
from tests.micro.vision import pictures


def test_without_library_and_weights_there_is_no_lpips(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert not is_available() and perceptual_diversity(pictures(2)) is None
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: object())
    assert not is_available(), "the weights would be downloaded"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / BACKBONE).touch()
    assert is_available()


@pytest.mark.parametrize(("count", "pairs"), [(3, 3), (30, 200)])
def test_the_mean_is_over_pairs_of_images_as_lpips_expects_them(
    monkeypatch: pytest.MonkeyPatch, count: int, pairs: int
) -> None:
    seen: list[Any] = []

    def measure(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        assert first.shape == second.shape == (1, 3, 256, 256) and first.min() >= -1 and second.max() <= 1
        seen.append((first.mean().item(), second.mean().item()))
        return (first.mean() - second.mean()).abs()

    monkeypatch.setattr(perceptual, "is_available", lambda: True)
    monkeypatch.setattr(perceptual, "_measure", lambda: measure)
    images = [np.full((32, 48, 3), 5 * number, dtype=np.uint8) for number in range(count)]
    found = perceptual_diversity(images)
    assert len(seen) == len(set(seen)) == pairs
    assert found == pytest.approx(np.mean([abs(a - b) for a, b in seen]))
    assert found == perceptual_diversity(images)
    assert perceptual_diversity(images[:1]) is None
