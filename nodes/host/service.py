"""Routes for programs: an image for a request, through ComfyUI's queue, and the state of the server."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ...sdxl_lora_core.messages import brief, shown
from .folders import preview_folder
from .memory import device
from .requests import Refused, answering, json_object
from .server import json_answer, route_table

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from aiohttp.web import Request, Response

log = logging.getLogger("sdxl_lora")

MAX_REQUEST = 256 * 1024  # bytes
MOST_WAITING = 100  # prompts in the queue; the environment variable SDXL_LORA_MOST_WAITING changes it
_SECONDS = 0.05  # between two looks at the queue
_KEPT = 3600  # s, that previews are kept after they were last shown
# By the exception that ended a job: the fault of the request, or of the machine.
_STATUS = {
    "FileNotFoundError": 404,
    "ValueError": 409,
    "OutOfMemory": 503,
    "OutOfMemoryError": 503,
    "MemoryError": 503,
    "OSError": 507,
    "PermissionError": 507,
}


@dataclass(frozen=True)
class GenerateJob:
    """A graph in API format, whose node `output` makes the images, and how to answer: `form` is png or json.

    `timeout` in seconds, of waiting and generating.
    """

    graph: dict[str, Any]
    output: str
    form: Literal["png", "json"]
    timeout: float

    def again(self) -> GenerateJob:
        """The same with an input that no node has, for which ComfyUI does not take it for the same."""
        node = self.graph[self.output]
        inputs = {**node["inputs"], "request": uuid.uuid4().hex}
        return replace(self, graph={**self.graph, self.output: {**node, "inputs": inputs}})


def add_service_routes(read_job: Callable[[dict[str, Any]], GenerateJob]) -> None:
    """Adds the routes. `read_job` checks a request and raises ValueError or FileNotFoundError.

    POST /sdxl_lora/generate with a JSON object is answered with a PNG, or with JSON: the images in base64.
    GET /sdxl_lora/health has the state of the queue, the device and the libraries' versions as JSON.

    Errors are {"error": a sentence}: 404 a model that does not exist, 409 a request that these models cannot fulfil or
    a job that was cancelled, 422 a wrong setting, 503 a full queue or memory, 504 a job that took longer than its
    timeout.
    """
    if (table := route_table()) is None:
        return
    service = _Service(read_job, _most_waiting())
    table.post("/sdxl_lora/generate")(answering(service.generate))
    table.get("/sdxl_lora/health")(answering(service.health))


class _Service:
    def __init__(self, read_job: Callable[[dict[str, Any]], GenerateJob], most_waiting: int) -> None:
        self._read_job, self._most_waiting, self._previews = read_job, most_waiting, _Previews()

    async def health(self, _: Request) -> Response:
        from importlib.metadata import version

        running, waiting = _queued()
        queue = {"running": len(running), "waiting": len(waiting), "most_waiting": self._most_waiting}
        libraries = {name: version(name) for name in ("torch", "diffusers")}
        return json_answer({"status": "ok", "queue": queue, "device": str(device()), "libraries": libraries})

    async def generate(self, request: Request) -> Response:
        wanted = await json_object(request, MAX_REQUEST)
        try:
            job = await asyncio.to_thread(self._read_job, wanted)
        except FileNotFoundError:
            raise
        except ValueError as error:
            raise Refused(422, brief(error)) from error
        if len(_queued()[1]) >= self._most_waiting:
            raise Refused(503, f"{self._most_waiting} prompts are waiting: try again later, or on another server")
        self._previews.remove_old()
        done = await _done(request, job)
        if not all(file.exists() for file in done.files):  # removed, and ComfyUI repeated what the node had shown
            done = await _done(request, job.again())
        return await _answer(done, job.form)


def _most_waiting() -> int:
    value = os.environ.get("SDXL_LORA_MOST_WAITING", str(MOST_WAITING))
    if not value.isdecimal():
        log.warning("SDXL_LORA_MOST_WAITING is %s: give a whole number; %d is used", shown(value), MOST_WAITING)
        return MOST_WAITING
    return int(value)


def _queue() -> Any:
    from server import PromptServer

    return PromptServer.instance.prompt_queue


def _queued() -> tuple[set[str], set[str]]:
    """The ids of the prompts that run and of those that wait."""
    running, waiting = _queue().get_current_queue_volatile()
    return {item[1] for item in running}, {item[1] for item in waiting}


class _Body:
    """A request of the server to itself: what ComfyUI's handler of POST /prompt reads."""

    headers: Mapping[str, str] = {}

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    async def json(self) -> dict[str, Any]:
        return self._values


async def _put_into_queue(graph: dict[str, Any]) -> str:
    """The id of the prompt, which ComfyUI has checked and numbered. Raises Refused with what it says of a wrong one."""
    import json

    from server import PromptServer

    routes = PromptServer.instance.routes
    post = next(route.handler for route in routes if route.method == "POST" and route.path == "/prompt")
    answer = await post(_Body({"prompt": graph}))
    found = json.loads(answer.body)
    if answer.status != 200:
        errors = [one for node in found.get("node_errors", {}).values() for one in node["errors"]]
        details = "; ".join(f"{one['message']}: {one['details']}" for one in errors)
        raise Refused(422, details or brief(str(found.get("error"))))
    return found["prompt_id"]


class _Previews:
    """Removes previews that were not shown for long: a server that runs for weeks would fill its disk."""

    def __init__(self) -> None:
        self._looked = 0.0

    def remove_old(self) -> None:
        if time.time() - self._looked < _KEPT / 60:
            return
        self._looked = time.time()
        for file in preview_folder().glob("*.png"):
            with contextlib.suppress(OSError):  # removed by another program
                if self._looked - file.stat().st_mtime > _KEPT:
                    file.unlink()


async def _finished(request: Request, prompt: str, timeout: float) -> dict[str, Any]:
    """The history entry of a prompt. A job that nobody waits for any more is taken out of the queue."""
    end = asyncio.get_running_loop().time() + timeout
    try:
        while True:
            is_queued = prompt in set.union(*_queued())
            if found := _queue().get_history(prompt):
                return found[prompt]
            if not is_queued:
                raise Refused(409, "the job was removed from ComfyUI's queue, or its result from the history")
            if request.transport is None or request.transport.is_closing():
                raise Refused(499, "the client has gone")
            if asyncio.get_running_loop().time() > end:
                raise Refused(504, f"the job was not finished within {timeout:g} s: raise timeout, or try again later")
            await asyncio.sleep(_SECONDS)
    except (Refused, asyncio.CancelledError):
        _withdraw(prompt)
        raise


def _withdraw(prompt: str) -> None:
    """Takes a prompt out of the queue, or stops it."""
    from comfy.model_management import interrupt_current_processing

    queue = _queue()
    if queue.delete_queue_item(lambda item: item[1] == prompt):
        return
    with queue.mutex:  # so that the next job does not begin, and is stopped in place of this one
        if any(item[1] == prompt for item in queue.currently_running.values()):
            interrupt_current_processing()


@dataclass(frozen=True)
class _Done:
    """The files of a job's images, and for each the facts of its making."""

    files: Sequence[Path]
    facts: Sequence[Mapping[str, Any]]


async def _done(request: Request, job: GenerateJob) -> _Done:
    """Puts a job into the queue and waits for it. Raises Refused if it fails."""
    prompt = await _put_into_queue(job.graph)
    entry = await _finished(request, prompt, job.timeout)
    messages = entry["status"]["messages"]
    _require_success(messages)
    shown_by_node = entry["outputs"][job.output]
    facts: Sequence[Mapping[str, Any]] = shown_by_node["sdxl_lora_made"]
    if _was_cached(job.output, messages):  # by ComfyUI: the facts are those of the job that made the images
        facts = [{**one, "from_cache": True, "seconds": 0} for one in facts]
    return _Done([preview_folder() / image["filename"] for image in shown_by_node["images"]], facts)


async def _answer(done: _Done, form: str) -> Response:
    from aiohttp.web import Response

    images, made = await asyncio.to_thread(lambda: [file.read_bytes() for file in done.files]), done.facts
    if form == "png":
        facts = {"X-Seed": str(made[0]["seed"]), "X-From-Cache": str(made[0]["from_cache"]).lower()}
        return Response(body=images[0], content_type="image/png", headers=facts)
    encoded = [{"png": base64.b64encode(data).decode(), **facts} for data, facts in zip(images, made, strict=True)]
    return json_answer({"images": encoded})


def _was_cached(node: str, messages: Sequence[Sequence[Any]]) -> bool:
    return any(name == "execution_cached" and node in data["nodes"] for name, data in messages)


def _require_success(messages: Sequence[Sequence[Any]]) -> None:
    for name, data in messages:
        if name == "execution_interrupted":
            raise Refused(409, "the job was cancelled in ComfyUI")
        if name == "execution_error":
            kind = str(data["exception_type"]).rpartition(".")[2]
            raise Refused(_STATUS.get(kind, 500), brief(data["exception_message"].strip()) or shown(kind))
