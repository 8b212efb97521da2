"""What a run leaves for a person to follow it by: its metrics and its chart, kept up to date while it trains."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..config.watch import TensorBoard
from ..run.loop_state import Look, LoopState
from .charts import draw_loss_chart
from .metrics import Metrics, Row
from .progress import Smoothing, StepReport

log = logging.getLogger("sdxl_lora")

CHART_SECONDS = 10  # between two drawings while the run goes on: drawing takes a quarter of a second


class Journal:
    """Writes into the run's folder. Whatever fails here is warned about and never ends the run.

    Without a folder it writes nothing: of several processes, only the first one keeps a journal.
    """

    def __init__(self, folder: Path | None, title: str, tensorboard: TensorBoard) -> None:
        self._folder, self._title = folder, title
        self._tensorboard: TensorBoard = tensorboard
        self._drawn = -math.inf
        self._metrics: Metrics | None = None

    def open(self, state: LoopState) -> None:
        """To be called with what a resumed run has behind it, and again whenever the run goes back to an older step."""
        self.close()
        if self._folder:
            self._metrics = Metrics(self._folder, self._tensorboard, list(_past(state)))

    def close(self) -> None:
        if self._metrics:
            self._metrics.close()

    def write(self, report: StepReport, look: Look | None) -> None:
        """The row of one update."""
        row = Row(
            report.done,
            report.loss,
            report.smoothed,
            report.learning_rate,
            look.validation_loss if look else None,
            report.images_per_second,
            report.memory,
        )
        if self._metrics:
            self._metrics.add(row)

    def show(self, pictures: Sequence[np.ndarray], step: int) -> None:
        """Samples, uint8 [H, W, 3], for TensorBoard."""
        for number, pixels in enumerate(pictures):
            if self._metrics:
                self._metrics.add_picture(f"sample/{number:02d}", pixels, step)

    def draw(self, state: LoopState, kept: Look | None, now: bool = False) -> None:
        """loss.png as the run stands, with the look that would be kept. Not more often than every CHART_SECONDS
        unless it has to be `now`.
        """
        if self._folder is None or (not now and time.monotonic() - self._drawn < CHART_SECONDS):
            return
        try:
            draw_loss_chart(self._folder / "loss.png", self._title, state, kept.step if kept else None)
        except OSError as error:
            log.warning("the chart could not be drawn: %s", error)
        self._drawn = time.monotonic()


def _past(state: LoopState) -> Iterator[Row]:
    """The rows of what a resumed run has behind it."""
    validation = {look.step: look.validation_loss for look in state.looks}
    smoothing = Smoothing()
    if 0 in validation:
        yield Row(0, validation_loss=validation[0])
    for step, (loss, rate) in enumerate(zip(state.losses, state.learning_rates, strict=True), 1):
        yield Row(step, loss, smoothing.add(loss), rate, validation.get(step))
