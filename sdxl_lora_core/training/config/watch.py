"""How long a run is, and what is measured and kept of it while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...settings import MANY, SOMETHING, setting

KeepBest = Literal["off", "validation_loss", "clip_score"]
TensorBoard = Literal["auto", "off"]


@dataclass(frozen=True, kw_only=True)
class WatchSettings:
    """What is measured and kept while the run trains, and when it ends by itself."""

    sample_prompts: tuple[str, ...] = setting((), "One prompt a line; the finished LoRA draws each once. Empty: none.")
    epochs: int = setting(
        0,
        "Trains until every image was seen this often, repeats counted, instead of for `steps`. 0: steps count.",
        low=0,
        high=MANY,
        group="watch",
    )
    checkpoint_every: int = setting(
        250, "Steps between checkpoints. Lower it where a crash is likely.", low=1, high=MANY, group="watch"
    )
    validate_every: int = setting(
        0,
        "Steps between measurements of the loss on held-out images. 0: only before and after the training.",
        low=0,
        high=MANY,
        group="watch",
    )
    early_stopping: int = setting(
        0,
        "Stops when so many validations in a row bring no lower loss. 3 to 5 is usual; 0: never.",
        low=0,
        high=1000,
        group="watch",
    )
    keep_best: KeepBest = setting(
        "off",
        "What the file holds: off, the last step; otherwise the step with the lowest validation loss, or with the "
        "highest mean CLIP score of the samples.",
        group="watch",
    )
    sample_every: int = setting(
        0,
        "Steps between samples while it trains: each costs an image's generation a prompt. 0: only at the end.",
        low=0,
        high=MANY,
        group="watch",
    )
    clip_model: str = setting(
        "",
        "CLIP model that scores the samples, by its name on the CLIP Score node. Without one they get no score.",
        group="watch",
        only_with=("sample_prompts", SOMETHING),
    )
    tensorboard: TensorBoard = setting(
        "auto", "auto: event files in the run folder if tensorboard is installed. off: never.", group="watch"
    )
    sample_steps: int = setting(
        25,
        "Denoising steps of a sample. Fewer are faster and rougher.",
        low=1,
        high=200,
        group="watch",
        only_with=("sample_prompts", SOMETHING),
    )
    sample_guidance: float = setting(
        7.0,
        "Guidance scale of a sample. Take the one that you generate with.",
        low=0,
        high=50,
        group="watch",
        only_with=("sample_prompts", SOMETHING),
    )


def check_watching(settings: WatchSettings) -> None:
    """What looks at the run has to be looked with."""
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
    if settings.sample_every and not settings.sample_prompts:
        raise ValueError(
            f"sample_every is {settings.sample_every} and sample_prompts is empty: give prompts, or set sample_every "
            "to 0"
        )
    if settings.keep_best == "clip_score" and not (settings.sample_every and settings.clip_model):
        raise ValueError(
            f"keep_best is 'clip_score', sample_every is {settings.sample_every} and clip_model is "
            f"{settings.clip_model!r}: set both, so that there are samples and they have a score"
        )
