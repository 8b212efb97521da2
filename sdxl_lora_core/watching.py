"""When a run is looked at while it trains, when it may stop early, and which of its adapters is the best so far.

All of it follows from the looks in the run's state, so that a resumed run decides as one that never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .dataset.caption_dataset import CaptionDataset
from .evaluation.clip_model import clip_fingerprint, require_clip_folder
from .training.config.train_config import TrainConfig


@dataclass(frozen=True)
class Look:
    """What was seen after `step` updates: the held-out loss, and each sample's CLIP score (None: unknown)."""

    step: int
    validation_loss: float | None = None
    clip_scores: Sequence[float | None] = ()

    @property
    def clip_score(self) -> float | None:
        """The mean, 0 to 100, if every sample has a score."""
        known = [score for score in self.clip_scores if score is not None]
        return sum(known) / len(known) if known and len(known) == len(self.clip_scores) else None


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


def deciding_looks(config: TrainConfig, dataset: CaptionDataset) -> dict[str, Any]:
    """What decides which step ends the run or is kept, as JSON values; empty where nothing but `steps` does."""
    if not config.early_stopping and config.keep_best == "off":
        return {}
    deciding = {
        "early_stopping": config.early_stopping,
        "keep_best": config.keep_best,
        "validate_every": config.validate_every,
        "validation": [[entry.sha256, entry.caption, entry.resolution] for entry in dataset.validation],
    }
    if config.keep_best != "clip_score":
        return deciding
    return deciding | {
        "sample_every": config.sample_every,
        "samples": [config.sample_prompts, config.sample_steps, config.sample_guidance],
        "clip_model": clip_fingerprint(Path(config.clip_model)),
    }


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
