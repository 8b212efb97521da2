"""The settings of a dataset folder."""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import Range, check_settings, setting

SIDE_MULTIPLE = 16  # pixels


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """How a folder of images is read as training data."""

    trigger_word: str = setting(
        "",
        "A word put before every caption, and the whole caption of images without one. Use it in prompts to activate "
        "what the LoRA learned. Empty: captions are not changed, and images without one are skipped.",
    )
    resolution: int = setting(
        1024,
        "Images are scaled and cropped to buckets of at most resolution x resolution pixels in area. 1024 for SDXL, "
        "128 for the bundled tiny-sdxl.",
        Range(64, 4096, step=SIDE_MULTIPLE),
    )
    validation_percent: int = setting(
        0,
        "Percentage of the images held out of training to measure the validation loss on. 0: train on all.",
        Range(0, 50),
    )
    repeats: int = setting(
        1, "How often each image of this folder is seen in an epoch, relative to other folders.", Range(1, 1000)
    )
    flip: bool = setting(
        False,
        "Mirrors images with a probability of one half. Not for text, faces, or anything whose left and right differ.",
    )
    random_crops: int = setting(
        0,
        "Number of random crops in place of the centre crop, for images that do not fit their bucket exactly; each is "
        "encoded once. 0: centre crop.",
        Range(0, 64),
    )
    caption_per_line: bool = setting(
        False,
        "Each line of a caption file is a caption of its own, and every step samples one of them. Off: the lines form "
        "one caption.",
    )
    is_regularisation: bool = setting(
        False,
        "These images show the class of the subject (any cat, if yours is trained), which the LoRA should not change. "
        "Connect the dataset of the training images, and leave trigger_word empty.",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.resolution % SIDE_MULTIPLE:
            raise ValueError(f"resolution is {self.resolution}: give a multiple of {SIDE_MULTIPLE}")
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
