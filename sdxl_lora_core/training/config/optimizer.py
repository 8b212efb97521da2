"""The optimizer, its learning rate over the run and the moving average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ...settings import MANY, setting

LRSchedule = Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"]
Optimizer = Literal["adamw", "adamw_fused", "adamw8bit", "adafactor", "lion", "prodigy", "came", "schedule_free"]
MOMENTUM_OPTIMIZERS = tuple(name for name in get_args(Optimizer) if name != "adafactor")
ADAM_LIKE_OPTIMIZERS = tuple(name for name in get_args(Optimizer) if name != "lion")


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """The optimizer, its constants, and the learning rate over the run."""

    learning_rate: float = setting(
        1e-4,
        "Size of each update. Lower it if images turn noisy or burnt, raise it if little is learned. "
        "Lion wants a fifth of the usual, Prodigy wants 1.",
        low=1e-8,
        high=1.0,
        step=1e-5,
        only_with=("train_unet", (True,)),
    )
    gradient_accumulation: int = setting(
        1, "Passes per update: acts like a larger batch without its memory.", low=1, high=1024
    )
    lr_schedule: LRSchedule = setting(
        "constant",
        "How the learning rate goes over the run: it stays, or falls to 0 along a line, a cosine (several with "
        "restarts) or a power of the line.",
    )
    lr_warmup_steps: int = setting(0, "The learning rate rises from 0 over this many steps.", low=0, high=MANY)
    optimizer: Optimizer = setting(
        "adamw",
        "adamw suits nearly all. adamw_fused is quicker on a GPU; adamw8bit, adafactor, lion and came need less "
        "memory; prodigy finds its learning rate; schedule_free needs no schedule.",
        group="optimizer",
    )
    adam_beta1: float = setting(
        0.9,
        "How long the mean gradient is remembered, of 1.",
        low=0,
        high=0.9999,
        group="optimizer",
        only_with=("optimizer", MOMENTUM_OPTIMIZERS),
    )
    adam_beta2: float = setting(
        0.999,
        "How long the squared gradient is remembered, of 1.",
        low=0,
        high=0.99999,
        group="optimizer",
        only_with=("optimizer", ADAM_LIKE_OPTIMIZERS),
    )
    weight_decay: float = setting(1e-2, "Pulls the LoRA's weights towards zero.", low=0, high=10, group="optimizer")
    max_grad_norm: float = setting(
        1.0, "Longer gradients are cut to this length. 0: never.", low=0, high=1e6, group="optimizer"
    )
    lr_cycles: int = setting(
        3,
        "How many times cosine_with_restarts starts again at the full learning rate, the first included.",
        low=1,
        high=1000,
        group="optimizer",
        only_with=("lr_schedule", ("cosine_with_restarts",)),
    )
    lr_power: float = setting(
        2.0,
        "The power of the polynomial schedule: 1 is the line, more falls sooner.",
        low=0.1,
        high=10,
        step=0.1,
        group="optimizer",
        only_with=("lr_schedule", ("polynomial",)),
    )
    ema_decay: float = setting(
        0.0,
        "Saves a moving average of the LoRA, which is steadier. 0.99 for short runs, 0.999 for long; 0 is off.",
        low=0,
        high=0.99999,
        step=0.001,
        group="optimizer",
    )


def check_optimizer(settings: OptimizerSettings) -> None:
    if settings.optimizer != "schedule_free":
        return
    if settings.lr_schedule != "constant":
        raise ValueError(
            f"optimizer is 'schedule_free' and lr_schedule is {settings.lr_schedule!r}: its averaging takes the place "
            "of a schedule, so set lr_schedule to constant"
        )
    if settings.ema_decay:
        raise ValueError(
            f"optimizer is 'schedule_free' and ema_decay is {settings.ema_decay}: it averages by itself, so set "
            "ema_decay to 0"
        )
    if settings.adam_beta1 == 0:
        raise ValueError("optimizer is 'schedule_free' and adam_beta1 is 0: it needs a value above 0, 0.9 is usual")
