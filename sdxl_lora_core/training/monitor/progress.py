"""Progress reports of a run: phase, loss, throughput, memory and time left."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ...runtime.device import memory_in_use, reset_peak


@dataclass(frozen=True)
class StepReport:
    """The present phase with `done` of `total` items; the other numbers are set only during training.

    `smoothed` is the moving average of the loss, `memory` is in bytes, `seconds_left` is estimated. The validation loss
    is set at the steps that were validated.
    """

    phase: str
    done: int
    total: int
    loss: float | None = None
    smoothed: float | None = None
    learning_rate: float | None = None
    images_per_second: float | None = None
    memory: int | None = None
    seconds_left: float | None = None
    validation_loss: float | None = None

    @property
    def detail(self) -> str:
        """The numbers in one line; empty outside of training."""
        if self.smoothed is None or self.learning_rate is None:
            return ""
        words = [f"loss {self.smoothed:.4f}", f"lr {self.learning_rate:.2e}"]
        if self.images_per_second is not None:
            words.append(f"{self.images_per_second:.2f} images/s")
        if self.memory is not None:
            words.append(f"{self.memory / 1e9:.1f} GB")
        if self.seconds_left is not None:
            words.append(f"{_clock(self.seconds_left)} left")
        return ", ".join(words)


OnStep = Callable[[StepReport], None]


class Smoothing:
    """Moving average over about `span` values that skips NaN.

    Exponential, with bias correction (Kingma and Ba, arXiv 1412.6980, section 3). NaN before the first finite value.
    """

    def __init__(self, span: int = 50) -> None:
        self._decay, self._average, self._weight = 1 - 1 / span, 0.0, 0.0

    def add(self, value: float) -> float:
        if math.isfinite(value):
            self._average = self._decay * self._average + (1 - self._decay) * value
            self._weight = self._decay * self._weight + (1 - self._decay)
        return self._average / self._weight if self._weight else math.nan


class Meter:
    """Measures a StepReport's numbers. Throughput counts update time only, not evaluation or saving."""

    def __init__(self, losses: Sequence[float], device: torch.device, span: int = 20) -> None:
        """`losses` are those of the past updates of a resumed run."""
        self._smoothing, self._device = Smoothing(), device
        self._updates: deque[tuple[int, float]] = deque(maxlen=span)
        for loss in losses:
            self._smoothing.add(loss)
        reset_peak(device)

    @contextmanager
    def update(self, images: int) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._updates.append((images, time.perf_counter() - start))

    def report(self, step: int, steps: int, loss: float, learning_rate: float) -> StepReport:
        """The report of a step, with the time per image of the updates that were measured so far."""
        images, seconds = (sum(column) for column in zip(*self._updates, strict=True))
        return StepReport(
            "training",
            step,
            steps,
            loss,
            self._smoothing.add(loss),
            learning_rate,
            images_per_second=round(images / max(seconds, 1e-9), 3),
            memory=memory_in_use(self._device),
            seconds_left=(steps - step) * seconds / len(self._updates),
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
