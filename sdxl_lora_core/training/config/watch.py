"""The settings of validation, sample images, checkpoints and early stopping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...settings import NOT_EMPTY, UNLIMITED, Range, setting

KeepBest = Literal["off", "validation_loss", "clip_score"]
TensorBoard = Literal["auto", "off"]
ImageLossesMode = Literal["auto", "on", "off"]


@dataclass(frozen=True, kw_only=True)
class WatchSettings:
    """Evaluation, checkpoints and early stopping."""

    sample_prompts: tuple[str, ...] = setting(
        (), "One prompt per line; the finished LoRA generates an image for each. Empty: none."
    )
    epochs: int = setting(
        0,
        "Number of passes over the dataset, repeats included, instead of `steps`. 0: steps are used.",
        Range(0, UNLIMITED),
    )
    checkpoint_every: int = setting(
        250, "Steps between checkpoints. Lower it if crashes are likely.", Range(1, UNLIMITED)
    )
    validate_every: int = setting(
        0,
        "Steps between evaluations of the loss on held-out images. 0: only before and after training.",
        Range(0, UNLIMITED),
    )
    early_stopping: int = setting(
        0, "Stops after this many validations in a row without a lower loss. 3 to 5 is usual; 0: never.", Range(0, 1000)
    )
    keep_best: KeepBest = setting(
        "off",
        "Which step is saved: off, the last one; otherwise that with the lowest validation loss, or with the highest "
        "mean CLIP score of the samples.",
    )
    sample_every: int = setting(
        0,
        "Steps between sample images during training; each takes the time to generate them. 0: only at the end.",
        Range(0, UNLIMITED),
        only_with={"sample_prompts": NOT_EMPTY},
    )
    clip_model: str = setting(
        "",
        "CLIP model that scores the samples, as named on the CLIP Score node. Empty: no scores.",
        only_with={"sample_prompts": NOT_EMPTY},
    )
    tensorboard: TensorBoard = setting(
        "auto", "auto: writes event files to the run folder if tensorboard is installed. off: never."
    )
    sample_steps: int = setting(
        25,
        "Denoising steps of a sample image. Fewer are faster and less detailed.",
        Range(1, 200),
        only_with={"sample_prompts": NOT_EMPTY},
    )
    sample_guidance: float = setting(
        7.0,
        "Guidance scale of a sample image. Use the value you generate with.",
        Range(0, 50),
        only_with={"sample_prompts": NOT_EMPTY},
    )
    save_every: int = setting(
        0,
        "Steps between LoRAs that are kept beside the finished one, in a folder of its name, as my_lora/step-000500, "
        "to compare them or to pick the best one. 0: none.",
        Range(0, UNLIMITED),
    )
    image_losses: ImageLossesMode = setting(
        "auto",
        "Measures the loss of each training image with its caption and without one, before and after training: an "
        "image whose caption does not help may have a wrong one. auto: if it takes less than a tenth of the training.",
    )


def check_watching(settings: WatchSettings) -> None:
    """Raises ValueError for an evaluation option without the data or model it evaluates with."""
    if settings.early_stopping and not settings.validate_every:
        raise ValueError(
            f"early_stopping is {settings.early_stopping} and validate_every is 0: set validate_every to the steps "
            "between two validations"
        )
    if settings.keep_best == "validation_loss" and not settings.validate_every:
        raise ValueError(
            "keep_best is 'validation_loss' and validate_every is 0: set validate_every to the steps between two "
            "validations"
        )
    if settings.keep_best == "clip_score" and not (settings.sample_every and settings.clip_model):
        raise ValueError(
            f"keep_best is 'clip_score', sample_every is {settings.sample_every} and clip_model is "
            f"{settings.clip_model!r}: set both, so that there are samples and they have a score"
        )
    if settings.keep_best == "clip_score" and not settings.sample_prompts:
        raise ValueError(
            "keep_best is 'clip_score' and sample_prompts is empty: give prompts, so that there are samples"
        )
