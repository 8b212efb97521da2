"""Averages of the trained weights, which are evaluated and saved in their place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..config.train_config import TrainConfig


class Averaging:
    """The exponential moving average (EMA) of `parameters`, float32, if `config.ema_decay` is set.

    Schedule-free optimizers have an average of their own.
    """

    def __init__(self, parameters: Sequence[Tensor], optimizer: Any, config: TrainConfig) -> None:
        self.parameters, self.decay = list(parameters), config.ema_decay
        self.schedule_free = optimizer if config.optimizer == "schedule_free" else None
        self.ema = [parameter.detach().clone() for parameter in parameters] if self.decay else []

    def update(self, step: int) -> None:
        """Updates the EMA after the 1-based `step`. Early steps decay faster, to forget the initial values."""
        if self.ema:
            decay = min(self.decay, (1 + step) / (10 + step))
            get_ema_multi_avg_fn(decay)(self.ema, self.parameters, step)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Replaces the parameters by the average within the block, and restores them bit for bit."""
        if not self.ema and self.schedule_free is None:
            yield
            return
        trained = [parameter.detach().clone() for parameter in self.parameters]
        try:
            self._put_average()
            yield
        finally:
            if self.schedule_free is not None:
                self.schedule_free.train()  # undoes eval() up to rounding
            _copy(trained, self.parameters)

    @contextmanager
    def on_cpu(self) -> Iterator[None]:
        """Moves the EMA to main memory within the block."""
        devices = [tensor.device for tensor in self.ema]
        self.ema = [tensor.to("cpu") for tensor in self.ema]
        try:
            yield
        finally:
            self.ema = [tensor.to(device) for tensor, device in zip(self.ema, devices, strict=True)]

    def _put_average(self) -> None:
        if self.schedule_free is not None:
            self.schedule_free.eval()
        else:
            _copy(self.ema, self.parameters)


@torch.no_grad()
def _copy(values: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    for value, target in zip(values, into, strict=True):
        target.copy_(value)
