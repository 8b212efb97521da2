"""The optimizer and its learning rate over the run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .adapters import ParameterGroup
from .train_config import TrainConfig


def make_optimizer(groups: Sequence[ParameterGroup], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of `config` with one parameter group for each of `groups`, in their order."""
    return torch.optim.AdamW(
        [{"params": group.parameters} for group in groups],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
    )


def set_learning_rates(optimizer: torch.optim.Optimizer, groups: Sequence[ParameterGroup], rate: float) -> None:
    """Each group learns at `rate` times its own factor."""
    for settings, group in zip(optimizer.param_groups, groups, strict=True):
        settings["lr"] = rate * group.rate_factor


def lr_factor(config: TrainConfig, step: int) -> float:
    """The learning rate at 0-based `step` as a share of `config.learning_rate`: warm-up, then the schedule."""
    if step < config.lr_warmup_steps:
        return (step + 1) / config.lr_warmup_steps
    progress = (step - config.lr_warmup_steps) / (config.steps - config.lr_warmup_steps)
    if config.lr_schedule == "linear":
        return 1 - progress
    if config.lr_schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0
