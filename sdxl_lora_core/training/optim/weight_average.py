"""The weights that a run is judged and saved by, where they are not the ones that learn but an average of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..config.train_config import TrainConfig


class Averaging:
    """Keeps the exponential moving average of `parameters` if `config` asks for one, float32 as they are.

    Schedule-free optimizers keep an average of their own.
    """

    def __init__(self, parameters: Sequence[Tensor], optimizer: Any, config: TrainConfig) -> None:
        self.parameters, self.decay = list(parameters), config.ema_decay
        self.schedule_free = optimizer if config.optimizer == "schedule_free" else None
        self.ema = [parameter.detach().clone() for parameter in parameters] if self.decay else []

    def update(self, step: int) -> None:
        """Takes in the parameters after the 1-based `step`. Early steps decay faster, or the start would stay in."""
        if self.ema:
            decay = min(self.decay, (1 + step) / (10 + step))
            get_ema_multi_avg_fn(decay)(self.ema, self.parameters, step)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the average into the parameters, and afterwards what they were, to the bit."""
        if not self.ema and self.schedule_free is None:
            yield
            return
        learning = [parameter.detach().clone() for parameter in self.parameters]
        try:
            self._put_average()
            yield
        finally:
            if self.schedule_free is not None:
                self.schedule_free.train()  # undoes eval() up to rounding
            _copy(learning, self.parameters)

    def _put_average(self) -> None:
        if self.schedule_free is not None:
            self.schedule_free.eval()
        else:
            _copy(self.ema, self.parameters)


@torch.no_grad()
def _copy(values: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    for value, target in zip(values, into, strict=True):
        target.copy_(value)
