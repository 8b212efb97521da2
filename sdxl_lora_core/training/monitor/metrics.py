"""Writes metrics.csv during training, and TensorBoard's event files if tensorboard is installed."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ...files import write_text_atomic
from ..config.watch import TensorBoard

log = logging.getLogger("sdxl_lora")


@dataclass(frozen=True)
class Row:
    """One update in metrics.csv; `memory` in bytes, unknown values empty. Row 0 is the base before training."""

    step: int
    loss: float | None = None
    smoothed: float | None = None
    learning_rate: float | None = None
    validation_loss: float | None = None
    images_per_second: float | None = None
    memory: int | None = None


COLUMNS = tuple(field.name for field in fields(Row))


class Metrics:
    """metrics.csv and the event files of one run. If the disk is full, they are incomplete and the run goes on.

    Opening rewrites the rows of past steps atomically; each further row is appended and flushed, so that readers see
    it at once. Rows after the step that a run resumes from are dropped, so no step occurs twice.
    """

    def __init__(self, folder: Path, tensorboard: TensorBoard, past: Sequence[Row]) -> None:
        """`past` are the rows known from the run's state; their speed and memory are read from the present file."""
        self._path, self._warned = folder / "metrics.csv", False
        measured = _measured(self._path)
        with self._warned_once():
            text = io.StringIO()
            rows = csv.writer(text, lineterminator="\n")
            rows.writerow(COLUMNS)
            rows.writerows([*astuple(row)[:5], *measured.get(str(row.step), ("", ""))] for row in past)
            write_text_atomic(self._path, text.getvalue())
        first = past[-1] if past else Row(0)
        self._events: Any = None
        if tensorboard == "auto":
            with self._warned_once():
                self._events = _event_writer(folder / "tensorboard", first.step)
        self._show(first)

    def add(self, row: Row) -> None:
        with self._warned_once(), self._path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(astuple(row))
        self._show(row)

    def _show(self, row: Row) -> None:
        if self._events:
            for name, value in zip(COLUMNS[1:], astuple(row)[1:], strict=True):
                if value is not None:
                    self._events.add_scalar(f"train/{name}", value, row.step)

    def add_image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Adds an image, uint8 [H, W, 3], to TensorBoard only."""
        if self._events:
            self._events.add_image(name, pixels, step, dataformats="HWC")

    @contextmanager
    def _warned_once(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._warned:
                log.warning("the metrics are not complete: %s", error)
            self._warned = True

    def close(self) -> None:
        if self._events:
            self._events.close()


def _event_writer(folder: Path, first_step: int) -> Any:
    """The writer, or None if tensorboard is not installed. It hides events of a crashed run from `first_step` on."""
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step)


def _measured(path: Path) -> dict[str, tuple[str, str]]:
    """Speed and memory of each step in an existing file, without incomplete rows of a crash."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if len(row) == len(COLUMNS)]
    except (OSError, UnicodeDecodeError, csv.Error):
        return {}
    return {row[0]: (row[5], row[6]) for row in rows}
