"""When a run is looked at while it trains, when it may stop early, and which of its adapters is the best so far.

All of it follows from the looks in the run's state, so that a resumed run decides as one that never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ...dataset.caption_dataset import CaptionDataset
from ...evaluation.clip_model import require_clip_folder
from ..config.train_config import TrainConfig
from ..run.loop_state import Look


def validation_due(config: TrainConfig, step: int) -> bool:
    """Apart from the look at the last step, which is due whatever step that is."""
    return step == 0 or _every(config.validate_every, step)


def samples_due(config: TrainConfig, step: int, last: bool) -> bool:
    """The last step counts where samples are compared; otherwise those of the finished file show it."""
    return step > 0 and (_every(config.sample_every, step) or (last and config.keep_best == "clip_score"))


def converged(config: TrainConfig, looks: Sequence[Look]) -> bool:
    """Whether the last `early_stopping` validations all failed to undercut the lowest loss before them."""
    losses = [_or_infinite(look.validation_loss) for look in looks if look.step and look.validation_loss is not None]
    return 0 < config.early_stopping <= len(losses) - 1 - losses.index(min(losses)) if losses else False


def best_look(config: TrainConfig, looks: Sequence[Look]) -> Look | None:
    """The look whose adapter `keep_best` keeps: the first of equals. The untrained adapter does not compete."""
    rated = [look for look in looks if look.step and math.isfinite(_rating(config, look))]
    return max(rated, key=lambda look: _rating(config, look), default=None)


def require_lookable(config: TrainConfig, dataset: CaptionDataset) -> None:
    """Raises FileNotFoundError or ValueError where the held-out images or the CLIP model to look with are missing."""
    if config.clip_model:
        require_clip_folder(Path(config.clip_model))
    settings = {"validate_every": config.validate_every, "early_stopping": config.early_stopping}
    for name, value in settings.items():
        if value and not dataset.validation:
            raise ValueError(
                f"{name} is {value} and no image is held out to validate with: raise the dataset's validation_percent, "
                f"or set {name} to 0"
            )


def _rating(config: TrainConfig, look: Look) -> float:
    """Higher is better; minus infinity where it is not known."""
    value = {"off": None, "validation_loss": look.validation_loss, "clip_score": look.clip_score}[config.keep_best]
    if value is None or not math.isfinite(value):
        return -math.inf
    return -value if config.keep_best == "validation_loss" else value


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


def _or_infinite(loss: float | None) -> float:
    return loss if loss is not None and math.isfinite(loss) else math.inf
