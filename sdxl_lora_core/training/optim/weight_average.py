"""Averages of the trained weights, which are evaluated and saved in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..config.train_config import TrainConfig


class Averaging:
    """The exponential moving average (EMA) of `parameters`, float32, if `config.ema_decay` is set.

    Schedule-free optimizers have an average of their own. `on_change` is called whenever the parameters were replaced.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        optimizer: Any,
        config: TrainConfig,
        on_change: Callable[[], object] = lambda: None,
    ) -> None:
        self.parameters, self.decay, self.on_change = list(parameters), config.ema_decay, on_change
        self.schedule_free = optimizer if config.optimizer == "schedule_free" else None
        self.ema = [parameter.detach().clone() for parameter in parameters] if self.decay else []

    @torch.no_grad()
    def update(self, step: int, is_finite: Tensor | float = 1.0) -> None:
        """Updates the EMA after the 1-based `step`. Early steps decay faster, to forget the initial values.

        `is_finite` is 0 if the update of the parameters was skipped, else 1; on the device, so that nothing waits.
        """
        weight = (1 - min(self.decay, (1 + step) / (10 + step))) * is_finite
        for average, parameter in zip(self.ema, self.parameters, strict=False):
            average.lerp_(parameter, weight)

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
            self._copy(trained)

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
        if self.schedule_free is None:
            self._copy(self.ema)
        else:
            self.schedule_free.eval()
            self.on_change()

    @torch.no_grad()
    def _copy(self, values: Sequence[Tensor]) -> None:
        for value, parameter in zip(values, self.parameters, strict=True):
            parameter.copy_(value)
        self.on_change()
