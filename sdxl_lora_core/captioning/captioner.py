"""Opens whatever writes captions: a captioning model, a tagger, or captions from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from ..vision.classifier import require_classifier_folder
from ..vision.model_folder import read_config
from .config import CaptionConfig
from .models import ModelCaptioner, is_captioner, require_captioner_folder
from .taggers import ClassifierTagger, OnnxTagger, is_onnx_tagger

Load = Callable[[Path], torch.nn.Module]


class Captioner(Protocol):
    """`name` is noted as the author of the captions."""

    @property
    def name(self) -> str: ...

    def open(self) -> None:
        """Loads what is needed, before the first image; not called if no image needs a caption."""
        ...

    def captions(self, keys: Sequence[str], images: Sequence[np.ndarray]) -> list[str]:
        """A caption for each image (uint8 [H, W, 3]), whose keys are given too; empty if there is none."""
        ...


@dataclass(frozen=True)
class Loaders:
    """Functions that return loaded models, so that they stay loaded between runs."""

    model: Load | None = None
    classifier: Load | None = None


def open_captioner(
    folder: Path, config: CaptionConfig, device: torch.device, loaders: Loaders | None = None
) -> Captioner:
    """The captioning model or tagger in a local folder.

    Reads its settings only. Raises FileNotFoundError or ValueError for a folder that is neither.
    """
    loaders = loaders or Loaders()
    if is_onnx_tagger(folder):
        return OnnxTagger(folder, config)
    settings = read_config(folder, "use a folder with a captioning model or a tagger")
    if not is_captioner(settings) and "id2label" in settings:
        require_classifier_folder(folder)
        more = {"load": loaders.classifier} if loaders.classifier else {}
        return ClassifierTagger(folder, config, device, **more)
    require_captioner_folder(folder)
    return ModelCaptioner(folder, config, device, loaders.model)
