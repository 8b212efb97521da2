"""The metrics and the chart of a run, updated while it trains."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..config.watch import TensorBoard
from ..run.loop_state import Evaluation, LoopState
from .charts import plot_losses
from .metrics import Metrics, Row
from .progress import Smoothing, StepReport

log = logging.getLogger("sdxl_lora")

CHART_SECONDS = 10  # between two charts during training: plotting takes a quarter of a second


class Journal:
    """Writes metrics and charts into the run's folder. Errors are logged and never end the run.

    Without a folder it writes nothing: of several processes only the first one writes.
    """

    def __init__(self, folder: Path | None, title: str, tensorboard: TensorBoard) -> None:
        self._folder, self._title = folder, title
        self._tensorboard: TensorBoard = tensorboard
        self._plotted = -math.inf
        self._metrics: Metrics | None = None

    def open(self, state: LoopState) -> None:
        """Starts the metrics with the past of a resumed run. Call again when the run goes back to an earlier step."""
        self.close()
        if self._folder:
            self._metrics = Metrics(self._folder, self._tensorboard, list(_past(state)))

    def close(self) -> None:
        if self._metrics:
            self._metrics.close()

    def write(self, report: StepReport) -> None:
        """Adds the row of an update."""
        row = Row(
            report.done,
            report.loss,
            report.smoothed,
            report.learning_rate,
            report.validation_loss,
            report.images_per_second,
            report.memory,
        )
        if self._metrics:
            self._metrics.add(row)

    def show(self, images: Sequence[np.ndarray], step: int) -> None:
        """Samples, uint8 [H, W, 3], for TensorBoard."""
        for number, pixels in enumerate(images):
            if self._metrics:
                self._metrics.add_image(f"sample/{number:02d}", pixels, step)

    def plot(self, state: LoopState, kept: Evaluation | None, now: bool = False) -> None:
        """Writes loss.png, marking the step that would be saved. At most every CHART_SECONDS, unless `now`."""
        if self._folder is None or (not now and time.monotonic() - self._plotted < CHART_SECONDS):
            return
        try:
            plot_losses(self._folder / "loss.png", self._title, state, kept.step if kept else None)
        except OSError as error:
            log.warning("the chart could not be written: %s", error)
        self._plotted = time.monotonic()


def _past(state: LoopState) -> Iterator[Row]:
    """The rows of the past steps of a resumed run."""
    validation = {past.step: past.validation_loss for past in state.looks}
    smoothing = Smoothing()
    if 0 in validation:
        yield Row(0, validation_loss=validation[0])
    for step, (loss, rate) in enumerate(zip(state.losses, state.learning_rates, strict=True), 1):
        yield Row(step, loss, smoothing.add(loss), rate, validation.get(step))
