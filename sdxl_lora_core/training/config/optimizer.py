"""The settings of the optimizer, the learning rate schedule and the moving average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ...settings import UNLIMITED, Range, setting

LRSchedule = Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"]
Optimizer = Literal["adamw", "adamw_fused", "adamw8bit", "adafactor", "lion", "prodigy", "came", "schedule_free"]
MOMENTUM_OPTIMIZERS = tuple(name for name in get_args(Optimizer) if name != "adafactor")
ADAM_LIKE_OPTIMIZERS = tuple(name for name in get_args(Optimizer) if name != "lion")


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """The optimizer, its hyperparameters, and the learning rate schedule."""

    learning_rate: float = setting(
        1e-4,
        "Learning rate of the UNet. Lower it if images become noisy or oversaturated, raise it if little is learned. "
        "Lion needs a fifth of the usual value, Prodigy needs 1.",
        Range(1e-8, 1.0, step=1e-5),
        only_with={"train_unet": (True,)},
    )
    gradient_accumulation: int = setting(
        1, "Batches per update: acts like a larger batch without its memory.", Range(1, 1024)
    )
    lr_schedule: LRSchedule = setting(
        "constant",
        "Learning rate schedule: constant, or decay to 0 along a line, a cosine (several with restarts) or a "
        "polynomial.",
    )
    lr_warmup_steps: int = setting(0, "Number of steps over which the learning rate rises from 0.", Range(0, UNLIMITED))
    optimizer: Optimizer = setting(
        "adamw",
        "adamw suits nearly every case. adamw_fused is faster on a GPU; adamw8bit, adafactor, lion and came need less "
        "memory; prodigy finds its own learning rate; schedule_free needs no schedule.",
    )
    adam_beta1: float = setting(
        0.9,
        "Decay rate of the moving average of the gradient.",
        Range(0, 0.9999),
        only_with={"optimizer": MOMENTUM_OPTIMIZERS},
    )
    adam_beta2: float = setting(
        0.999,
        "Decay rate of the moving average of the squared gradient.",
        Range(0, 0.99999),
        only_with={"optimizer": ADAM_LIKE_OPTIMIZERS},
    )
    weight_decay: float = setting(1e-2, "Decay of the LoRA's weights towards zero.", Range(0, 10))
    max_grad_norm: float = setting(1.0, "Gradients are clipped to this norm. 0: never.", Range(0, 1e6))
    lr_cycles: int = setting(
        3,
        "Number of cosine cycles of cosine_with_restarts.",
        Range(1, 1000),
        only_with={"lr_schedule": ("cosine_with_restarts",)},
    )
    lr_power: float = setting(
        2.0,
        "Exponent of the polynomial schedule: 1 is linear, more decays earlier.",
        Range(0.1, 10, step=0.1),
        only_with={"lr_schedule": ("polynomial",)},
    )
    ema_decay: float = setting(
        0.0,
        "Decay of an exponential moving average of the LoRA, which is saved. 0.99 for short runs, 0.999 for long; 0 "
        "is off.",
        Range(0, 0.99999, step=0.001),
    )


def check_optimizer(settings: OptimizerSettings) -> None:
    if settings.optimizer != "schedule_free":
        return
    if settings.lr_schedule != "constant":
        raise ValueError(
            f"optimizer is 'schedule_free' and lr_schedule is {settings.lr_schedule!r}: its averaging replaces a "
            "schedule, so set lr_schedule to constant"
        )
    if settings.ema_decay:
        raise ValueError(
            f"optimizer is 'schedule_free' and ema_decay is {settings.ema_decay}: it averages by itself, so set "
            "ema_decay to 0"
        )
    if settings.adam_beta1 == 0:
        raise ValueError("optimizer is 'schedule_free' and adam_beta1 is 0: it needs a value above 0, 0.9 is usual")
