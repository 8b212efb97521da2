"""LPIPS (Zhang et al., arXiv:1801.03924) between images, where its library and weights are installed."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

BACKBONE = "alexnet-owt-7be5be79.pth"  # torchvision's, which lpips would download
_PAIRS = 200  # of which the mean is taken
_SIDE = 256


def perceptual_diversity(images: Sequence[np.ndarray]) -> float | None:
    """The mean LPIPS (AlexNet) distance over pairs of images (uint8 [H, W, 3]), at 256 x 256 pixels; 0 if equal.

    Of at most 200 pairs, chosen with a fixed seed. None for a single image, and where the libraries lpips and
    torchvision or AlexNet's weights in torch's hub folder are missing: nothing is downloaded.
    """
    if len(images) < 2 or not is_available():
        return None
    pairs = list(itertools.combinations(range(len(images)), 2))
    if len(pairs) > _PAIRS:
        pairs = [pairs[i] for i in sorted(np.random.default_rng(0).choice(len(pairs), _PAIRS, replace=False))]
    measure = _measure()
    with torch.inference_mode():
        distances = [float(measure(_tensor(images[a]), _tensor(images[b]))) for a, b in pairs]
    return sum(distances) / len(distances)


def is_available() -> bool:
    """Whether LPIPS can be computed without a download."""
    libraries = all(importlib.util.find_spec(name) for name in ("lpips", "torchvision"))
    return libraries and (Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE).is_file()


def _measure() -> Any:
    import lpips  # type: ignore[import-not-found]

    return lpips.LPIPS(net="alex", verbose=False).eval()


def _tensor(pixels: np.ndarray) -> Tensor:
    """float32 [1, 3, 256, 256] in -1..1, as LPIPS expects."""
    values = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float() / 127.5 - 1
    return torch.nn.functional.interpolate(values, (_SIDE, _SIDE), mode="bilinear", antialias=True)
