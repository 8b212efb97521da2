"""Requests to the pack's routes: JSON bodies that are checked, and errors as answers."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from ...sdxl_lora_core.messages import brief, shown
from .server import json_answer

if TYPE_CHECKING:
    from aiohttp.web import FileResponse, Request, Response

Handler = Callable[["Request"], Awaitable["Response | FileResponse"]]
Kinds = Mapping[str, type | tuple[type, ...]]


class Refused(Exception):
    """A request that is answered with an HTTP status and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def answering(handler: Handler) -> Handler:
    """The handler, with its errors as answers: {"error": a sentence} and a status of 4xx, or 507 for a full disk."""

    async def answer(request: Request) -> Response | FileResponse:
        try:
            return await handler(request)
        except Refused as error:
            return json_answer({"error": str(error)}, error.status)
        except FileNotFoundError as error:
            return json_answer({"error": brief(error)}, 404)
        except (OSError, ValueError) as error:
            return json_answer({"error": brief(error)}, 400)

    return answer


async def json_body(request: Request, kinds: Kinds, most: int) -> dict[str, Any]:
    """The values of a JSON object of at most `most` bytes, with exactly the names and types in `kinds`."""
    body = await json_object(request, most)
    if set(body) != set(kinds):
        *names, last = kinds
        raise Refused(400, f"the request is {shown(body)}: send an object with {', '.join(names)} and {last}")
    for name, kind in kinds.items():
        if not isinstance(body[name], kind) or isinstance(body[name], bool):
            wanted = "a whole number" if kind is int else "a text"
            raise Refused(400, f"{name} is {shown(body[name])}: give {wanted}")
    return body


async def json_object(request: Request, most: int) -> dict[str, Any]:
    """A JSON object of at most `most` bytes.

    A form on another site cannot send JSON as its type: the browser then asks ComfyUI first, which permits its own page
    only.
    """
    if request.content_type != "application/json":
        raise Refused(415, f"the request is of type {shown(request.content_type)}: send application/json")
    require_length(request, most)
    try:
        body = json.loads(await request.read())
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the request is no JSON: {brief(error)}") from error
    if not isinstance(body, dict):
        raise Refused(400, f"the request is {shown(body)}: send an object")
    return body


def require_length(request: Request, most: int) -> None:
    if request.content_length is None:
        raise Refused(411, "the request does not say how long it is: send Content-Length")
    if request.content_length > most:
        raise Refused(413, f"the request has {request.content_length} bytes, the most are {most}: send less at once")
