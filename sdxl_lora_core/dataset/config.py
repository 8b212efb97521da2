"""How a folder becomes training data."""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import check_range


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """How a folder becomes training data.

    resolution is the side in pixels of the square whose area no bucket exceeds. repeats counts how often an image is
    seen in one epoch. flip adds mirrored images with an even chance. random_crops is the number of cuts at random
    places that take the place of the one from the middle. caption_per_line makes each line of a caption file a caption
    of its own. is_regularisation: images of the class that is trained, which the LoRA is to leave as they are.
    """

    trigger_word: str = ""
    resolution: int = 1024
    validation_percent: int = 0
    repeats: int = 1
    flip: bool = False
    random_crops: int = 0
    caption_per_line: bool = False
    is_regularisation: bool = False

    def __post_init__(self) -> None:
        check_range(self, "resolution", 64, 4096)
        check_range(self, "validation_percent", 0, 50)
        check_range(self, "repeats", 1, 1000)
        check_range(self, "random_crops", 0, 64)
        if self.resolution % 16:
            raise ValueError(f"resolution is {self.resolution}: give a multiple of 16")
        if self.is_regularisation:
            self._check_regularisation()

    def _check_regularisation(self) -> None:
        if self.trigger_word:
            raise ValueError(
                f"trigger_word is {self.trigger_word!r} with is_regularisation on: regularisation images show what the "
                "word does not mean, so leave it empty"
            )
        if self.validation_percent:
            raise ValueError(
                f"validation_percent is {self.validation_percent} with is_regularisation on: only training images are "
                "held out, so set it to 0"
            )
