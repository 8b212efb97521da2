"""What Ctrl-C and SIGTERM mean to a training run on the command line."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType


class Left(Exception):
    """The run was left; it goes on from its last step when it is started again."""

    def __init__(self, signal_number: int) -> None:
        super().__init__("stopped before the end, at a checkpoint: the same command continues")
        self.exit_status = 128 + signal_number


class Interruption:
    """While it is entered, signals are noted, and take effect between two steps.

    The first Ctrl-C asks the run to finish now and keep its LoRA. A second one, or SIGTERM, leaves the run: `check`,
    called at every step, raises Left, before which a checkpoint is written. A third Ctrl-C does not wait for that.
    """

    def __init__(self, tell: Callable[[str], object]) -> None:
        """`tell` shows a line to the person who pressed Ctrl-C."""
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
            self._tell("Finishing: the LoRA is saved after this step. Ctrl-C again leaves with only a checkpoint.")
        elif number == signal.SIGINT and self._leaving is not None:
            raise KeyboardInterrupt
        else:
            self._leaving = number
            self._tell("Leaving at the next step, after a checkpoint.")
