"""Progress on the terminal."""

from __future__ import annotations

from typing import Any, Self


class Bar:
    """A progress bar for each phase."""

    def __init__(self) -> None:
        self._phase = ("", 0)
        self._bar: Any = None

    def __call__(self, phase: str, done: int, total: int, detail: str = "") -> None:
        from tqdm import tqdm

        if (phase, total) != self._phase:
            self.close()
            self._phase, self._bar = (phase, total), tqdm(total=total, desc=phase)
        self._bar.set_postfix_str(detail, refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
