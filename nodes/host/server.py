"""The pack's route on ComfyUI's server: finish a training early and keep its LoRA."""

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
        self._pressed: threading.Event | None = None

    @contextmanager
    def offered(self) -> Iterator[Callable[[], bool]]:
        """Enables the button during a training; the callable tells whether it was pressed."""
        self._pressed = pressed = threading.Event()
        try:
            yield pressed.is_set
        finally:
            self._pressed = None

    def press(self) -> bool:
        """Requests the stop. Returns whether a training is running."""
        pressed = self._pressed
        if pressed is not None:
            pressed.set()
        return pressed is not None


stop_button = StopButton()


def add_routes() -> None:
    """Adds POST /sdxl_lora/stop, which presses the stop button. The status is 409 if no training is running."""
    if not running() or "server" not in sys.modules:  # scripts run nodes without the server
        return
    from aiohttp.web import json_response
    from server import PromptServer

    async def stop(_: Request) -> Response:
        stopping = stop_button.press()
        return json_response({"stopping": stopping}, status=200 if stopping else 409)

    PromptServer.instance.routes.post("/sdxl_lora/stop")(stop)
