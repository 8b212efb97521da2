"""Routes for Load LoRA's card: what a file in the loras folder says of itself, and the picture beside it."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ...sdxl_lora_core.messages import brief
from .server import json_answer, route_table

if TYPE_CHECKING:
    from aiohttp.web import FileResponse, Request, Response

Find = Callable[[str], Path]

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".preview.png", ".preview.jpg")


def add_lora_routes(find: Find) -> None:
    """Adds the routes. `find` gives the file of a name that Load LoRA offers, and raises for other names.

    GET /sdxl_lora/lora?name=NAME is the LoRACard as JSON, and whether there is a picture.
    GET /sdxl_lora/lora_picture?name=NAME is the picture beside the file: NAME.png and so on.
    """
    if (routes := route_table()) is None:
        return
    routes.get("/sdxl_lora/lora")(functools.partial(_card, find))
    routes.get("/sdxl_lora/lora_picture")(functools.partial(_picture, find))


async def _card(find: Find, request: Request) -> Response:
    from ...sdxl_lora_core.lora.describe import read_card

    try:
        path = find(request.query.get("name", ""))
        card = await asyncio.to_thread(read_card, path)
    except (OSError, ValueError) as error:
        return json_answer({"error": brief(error)}, 404)
    return json_answer({**card.as_json(), "picture": _beside(path) is not None})


async def _picture(find: Find, request: Request) -> Response | FileResponse:
    from aiohttp.web import FileResponse

    try:
        picture = _beside(find(request.query.get("name", "")))
    except (OSError, ValueError) as error:
        return json_answer({"error": brief(error)}, 404)
    if picture is None:
        return json_answer({"error": "no picture lies beside the file: save one under its name, as .png"}, 404)
    return FileResponse(picture)


def _beside(lora: Path) -> Path | None:
    pictures = (lora.with_suffix(ending) for ending in PICTURES)
    return next((path for path in pictures if path.is_file()), None)
