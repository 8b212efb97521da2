"""Taggers: WD v3 and others of its format as ONNX, and multi-label classifiers of transformers."""

from __future__ import annotations

import csv
import importlib.util
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..messages import brief
from ..vision.classifier import class_logits, labels_of, load_classifier
from ..vision.model_folder import load_processor
from .config import CaptionConfig

_MODEL, _TAGS = "model.onnx", "selected_tags.csv"
_CHARACTER, _RATING = "4", "9"  # of the column category, as Danbooru numbers them
_WORD = re.compile(r"[^\W\d_]{2}")


@dataclass(frozen=True)
class Tag:
    """A tag as captions have it, with the probability from which it is written; None: never, as a rating."""

    name: str
    threshold: float | None


def is_onnx_tagger(folder: Path) -> bool:
    return (folder / _MODEL).is_file() and (folder / _TAGS).is_file()


@dataclass
class OnnxTagger:
    """A tagger as model.onnx with selected_tags.csv (tag_id, name, category, count), such as WD v3."""

    folder: Path
    config: CaptionConfig

    @property
    def name(self) -> str:
        return self.folder.name

    def open(self) -> None:
        """Raises ValueError if onnxruntime is not installed, or for files that cannot be used."""
        if importlib.util.find_spec("onnxruntime") is None:
            raise ValueError(f"{self.name!r} is an ONNX model: python -m pip install onnxruntime")
        import onnxruntime

        self._tags = read_tags(self.folder / _TAGS, self.config)
        try:
            available = onnxruntime.get_available_providers()
            self._session: Any = onnxruntime.InferenceSession(str(self.folder / _MODEL), providers=available)
        except Exception as error:  # of any type: onnxruntime has its own
            raise ValueError(f"{self.name}/{_MODEL} cannot be opened: {brief(error)}") from error
        self._input = self._session.get_inputs()[0]
        count = self._session.get_outputs()[0].shape[-1]
        if isinstance(count, int) and count != len(self._tags):  # a name stands for a size that may vary
            raise ValueError(
                f"{self.name}/{_TAGS} has {len(self._tags)} tags and the model {count}: copy both files again"
            )

    def captions(self, keys: Sequence[str], images: Sequence[np.ndarray]) -> list[str]:
        """The tags of each image (uint8 [H, W, 3]), the likeliest first, characters before others."""
        side = self._input.shape[1]
        found = [self._session.run(None, {self._input.name: wd_input(image, side)[None]})[0][0] for image in images]
        return [join_tags(self._tags, row) for row in found]


@dataclass
class ClassifierTagger:
    """A multi-label classifier in transformers' format. `load` can return a model that is loaded already."""

    folder: Path
    config: CaptionConfig
    device: torch.device
    load: Callable[[Path], torch.nn.Module] = load_classifier

    @property
    def name(self) -> str:
        return self.folder.name

    def open(self) -> None:
        """Loads the model. Raises ValueError naming what cannot be used."""
        self._model = self.load(self.folder).to(self.device)
        self._processor = load_processor(self.folder, self._model)
        self._tags = [Tag(as_words(label), self.config.tag_threshold) for label in labels_of(self._model)]

    def captions(self, keys: Sequence[str], images: Sequence[np.ndarray]) -> list[str]:
        """The tags of each image (uint8 [H, W, 3]), the likeliest first."""
        found = class_logits(self._model, self._processor, images).sigmoid()
        return [join_tags(self._tags, row.tolist()) for row in found]


def read_tags(file: Path, config: CaptionConfig) -> list[Tag]:
    """The tags of selected_tags.csv in the order of the model's outputs. Raises ValueError if it has other columns."""
    with open(file, encoding="utf-8", newline="") as text:
        rows = list(csv.DictReader(text))
    if not rows or not {"name", "category"} <= set(rows[0]):
        raise ValueError(f"{file.parent.name}/{file.name} lacks the columns name and category: copy it again")
    thresholds = {_CHARACTER: config.character_threshold, _RATING: None}
    return [Tag(as_words(row["name"]), thresholds.get(row["category"], config.tag_threshold)) for row in rows]


def as_words(tag: str) -> str:
    """`long_hair` as `long hair`; faces such as `^_^` stay."""
    return tag.replace("_", " ") if _WORD.search(tag) else tag


def join_tags(tags: Sequence[Tag], probabilities: Iterable[float]) -> str:
    """The tags over their thresholds with the likeliest first, separated by commas."""
    pairs = sorted(zip(probabilities, tags, strict=True), key=lambda pair: -pair[0])
    return ", ".join(tag.name for value, tag in pairs if tag.threshold is not None and value >= tag.threshold)


def wd_input(image: np.ndarray, side: int) -> np.ndarray:
    """An image (uint8 [H, W, 3]) on a white square, as WD taggers take it: float32 [side, side, 3], BGR, 0 to 255."""
    picture = Image.fromarray(image)
    longer = max(picture.size)
    square = Image.new("RGB", (longer, longer), (255, 255, 255))
    square.paste(picture, ((longer - picture.width) // 2, (longer - picture.height) // 2))
    return np.asarray(square.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)[:, :, ::-1]
