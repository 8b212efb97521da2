"""When a run is evaluated, when it stops early, and which of its adapters is the best so far.

All of it follows from the evaluations in the run's state, so that a resumed run decides as an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ...dataset.caption_dataset import CaptionDataset
from ...vision.image_text import require_clip_folder
from ..config.train_config import TrainConfig
from ..run.loop_state import Evaluation


def validation_due(config: TrainConfig, step: int) -> bool:
    """Whether to validate after this step; the last step is always validated."""
    return step == 0 or _every(config.validate_every, step)


def samples_due(config: TrainConfig, step: int, last: bool) -> bool:
    """Whether to generate samples after this step; after the last one only if they are compared."""
    if step == 0 or not config.sample_prompts:
        return False
    return _every(config.sample_every, step) or (last and config.keep_best == "clip_score")


def converged(config: TrainConfig, evaluations: Sequence[Evaluation]) -> bool:
    """Whether the last `early_stopping` validations all failed to undercut the lowest loss before them."""
    losses = [_or_infinite(e.validation_loss) for e in evaluations if e.step and e.validation_loss is not None]
    return 0 < config.early_stopping <= len(losses) - 1 - losses.index(min(losses)) if losses else False


def best_evaluation(config: TrainConfig, evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """The evaluation whose adapter `keep_best` saves, the first of equals; never that of the untrained adapter."""
    rated = [e for e in evaluations if e.step and math.isfinite(_rating(config, e))]
    return max(rated, key=lambda e: _rating(config, e), default=None)


def require_evaluable(config: TrainConfig, dataset: CaptionDataset) -> None:
    """Raises FileNotFoundError or ValueError if the held-out images or the CLIP model of an evaluation are missing."""
    if config.clip_model:
        require_clip_folder(Path(config.clip_model))
    settings = {"validate_every": config.validate_every, "early_stopping": config.early_stopping}
    for name, value in settings.items():
        if value and not dataset.validation:
            raise ValueError(
                f"{name} is {value} and no image is held out to validate with: raise the dataset's validation_percent, "
                f"or set {name} to 0"
            )


def _rating(config: TrainConfig, evaluation: Evaluation) -> float:
    """Higher is better; minus infinity if unknown."""
    ratings = {"off": None, "validation_loss": evaluation.validation_loss, "clip_score": evaluation.clip_score}
    value = ratings[config.keep_best]
    if value is None or not math.isfinite(value):
        return -math.inf
    return -value if config.keep_best == "validation_loss" else value


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


def _or_infinite(loss: float | None) -> float:
    return loss if loss is not None and math.isfinite(loss) else math.inf
