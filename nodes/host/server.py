"""The pack's routes on ComfyUI's server: what nodes do, what runs have done, and finishing a training early."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ...sdxl_lora_core.files import safe_path
from ...sdxl_lora_core.training.monitor.history import run_history, runs_of
from .comfy import running
from .folders import output_folder
from .status import board

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
    """Adds the routes, whose answers are JSON:

    POST /sdxl_lora/stop presses the stop button; the status is 409 if no training is running.
    GET /sdxl_lora/status is a list of the latest NodeStatus of each node.
    GET /sdxl_lora/runs?series=NAME is a list of the runs' names of this lora_name, the newest first.
    GET /sdxl_lora/runs/NAME is the history of a run (see run_history); the status is 404 if there is no such run.
    """
    if (routes := route_table()) is None:
        return
    routes.post("/sdxl_lora/stop")(_stop)
    routes.get("/sdxl_lora/status")(_status)
    routes.get("/sdxl_lora/runs")(_series)
    routes.get("/sdxl_lora/runs/{name}")(_run)


async def _stop(_: Request) -> Response:
    stopping = stop_button.press()
    return json_answer({"stopping": stopping}, 200 if stopping else 409)


async def _status(_: Request) -> Response:
    return json_answer(board.all())


async def _series(request: Request) -> Response:
    return json_answer(runs_of(output_folder() / "lora_runs", request.query.get("series", "")))


async def _run(request: Request) -> Response:
    name = request.match_info["name"]
    try:
        folder = safe_path(output_folder() / "lora_runs", name)
    except ValueError as error:
        return json_answer({"error": str(error)}, 400)
    if not os.path.exists(folder / "identity"):  # which is False, too, for a name that no file system takes
        return json_answer({"error": f"there is no run {name} in {folder.parent}"}, 404)
    return json_answer(run_history(folder))


def route_table() -> Any:
    """Where ComfyUI's server takes routes; None in scripts, which run nodes without the server."""
    if not running() or "server" not in sys.modules:
        return None
    from server import PromptServer

    return PromptServer.instance.routes


def json_answer(body: object, status: int = 200) -> Response:
    from aiohttp.web import json_response

    return json_response(body, status=status)
