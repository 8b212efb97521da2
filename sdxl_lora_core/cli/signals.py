"""Ctrl-C and SIGTERM during a training run on the command line."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType


class Left(Exception):
    """The run was stopped; started again, it resumes at its last step."""

    def __init__(self, signal_number: int) -> None:
        super().__init__("stopped at a checkpoint before the end: the same command resumes it")
        self.exit_status = 128 + signal_number


class Interruption:
    """Within the block, signals are recorded and take effect between two steps.

    The first Ctrl-C finishes the run early and keeps its LoRA. A second one, or SIGTERM, stops the run: `check`, called
    at every step, raises Left, and a checkpoint is written. A third Ctrl-C does not wait for that.
    """

    def __init__(self, tell: Callable[[str], object]) -> None:
        """`tell` prints a line to the terminal."""
        self._tell = tell
        self._stopping = False
        self._leaving: int | None = None

    def __enter__(self) -> Interruption:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def should_stop(self) -> bool:
        return self._stopping

    def check(self) -> None:
        if self._leaving is not None:
            raise Left(self._leaving)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and not self._stopping:
            self._stopping = True
            self._tell("Finishing: the LoRA is saved after this step. Ctrl-C again stops with a checkpoint only.")
        elif number == signal.SIGINT and self._leaving is not None:
            raise KeyboardInterrupt
        else:
            self._leaving = number
            self._tell("Stopping at the next step, with a checkpoint.")
