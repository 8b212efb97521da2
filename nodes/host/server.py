"""The pack's routes on ComfyUI's server: stop a training and keep its LoRA."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .comfy import running

if TYPE_CHECKING:
    from aiohttp.web import Request, Response


class StopButton:
    """Finishes a training early and keeps its LoRA."""

    def __init__(self) -> None:
        self._wanted: threading.Event | None = None

    @contextmanager
    def offered(self) -> Iterator[Callable[[], bool]]:
        """While a training runs; the callable says whether it is to finish."""
        self._wanted = wanted = threading.Event()
        try:
            yield wanted.is_set
        finally:
            self._wanted = None

    def press(self) -> bool:
        """Whether there was a training to stop."""
        wanted = self._wanted
        if wanted is not None:
            wanted.set()
        return wanted is not None


stop_button = StopButton()


def add_routes() -> None:
    """POST /sdxl_lora/stop presses the stop button. Its answer has status 409 when nothing trains."""
    if not running() or "server" not in sys.modules:  # a script may run nodes without the server
        return
    from aiohttp.web import json_response
    from server import PromptServer

    async def stop(_: Request) -> Response:
        stopping = stop_button.press()
        return json_response({"stopping": stopping}, status=200 if stopping else 409)

    PromptServer.instance.routes.post("/sdxl_lora/stop")(stop)
