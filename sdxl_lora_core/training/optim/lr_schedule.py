"""Learning rate schedules."""

from __future__ import annotations

import math
from dataclasses import replace

from ..config.train_config import TrainConfig


def lr_factor(config: TrainConfig, step: int) -> float:
    """The learning rate at 0-based `step` as a share of `config.learning_rate`: warm-up, then the schedule."""
    if step < config.lr_warmup_steps:
        return (step + 1) / config.lr_warmup_steps
    progress = (step - config.lr_warmup_steps) / (config.steps - config.lr_warmup_steps)
    if config.lr_schedule == "linear":
        return 1 - progress
    if config.lr_schedule == "polynomial":
        return (1 - progress) ** config.lr_power
    if config.lr_schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if config.lr_schedule == "cosine_with_restarts":
        return 0.5 * (1 + math.cos(math.pi * (config.lr_cycles * progress % 1)))
    return 1.0


def learning_rate(config: TrainConfig, step: int, schedule_start: int = 0) -> float:
    """The learning rate at 0-based `step`, when the schedule counts from `schedule_start` to the last step."""
    if schedule_start == 0:
        return config.leading_rate * lr_factor(config, step)
    left = config.steps - schedule_start
    rest = replace(config, steps=left, lr_warmup_steps=min(config.lr_warmup_steps, left - 1))
    return config.leading_rate * lr_factor(rest, step - schedule_start)
