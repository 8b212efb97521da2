"""Routes for the page of Load Caption Dataset: thumbnails, captions that are edited, and folders that are uploaded.

Requests that change files need what a form on another site cannot send: JSON as their type, or a header of our own. The
browser then asks ComfyUI first, which permits its own page only.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...sdxl_lora_core.dataset.editing import (
    CaptionWriter,
    Uploads,
    check_folder_name,
    check_upload,
    thumbnail,
    upload_limit,
)
from ...sdxl_lora_core.dataset.report import listing
from ...sdxl_lora_core.files import temporary_beside
from ...sdxl_lora_core.messages import brief, shown
from .folders import input_folder, own_dataset_folder
from .requests import Kinds, Refused, answering, json_body, require_length
from .server import json_answer, route_table

if TYPE_CHECKING:
    from aiohttp import BodyPartReader, MultipartReader
    from aiohttp.web import Request, Response

MAX_CAPTION_REQUEST = 512 * 1024  # bytes of JSON: a caption of 64 KiB, escaped
MAX_UPLOAD_REQUEST = 256 * 2**20  # bytes
MAX_UPLOAD_FILES = 64  # in a request
UPLOAD_HEADER = "X-SDXL-LoRA"

_CAPTION: Kinds = {"folder": str, "image": str, "text": (str, type(None))}


def add_dataset_routes(names: Callable[[], list[str]], find: Callable[[str], Path]) -> None:
    """Adds the routes. `names` are those of all datasets, `find` gives the folder of one and raises for other names.

    GET /sdxl_lora/datasets is the list of names.
    GET /sdxl_lora/dataset?folder=NAME&trigger_word=WORD lists the images with their captions, see report.listing.
    For a folder that cannot be read, the list is {"error": a sentence}.
    GET /sdxl_lora/dataset/thumbnail?folder=NAME&image=PATH is a JPEG of an image, at most 256 px on a side.
    POST /sdxl_lora/dataset/caption with {"folder", "image", "text"} as JSON writes the caption of an image. The answer
    has the caption file and the `previous` text, null if there was no file. A text of null removes a caption file that
    this route has created.
    POST /sdxl_lora/dataset/upload?folder=NAME with files as multipart/form-data and the header X-SDXL-LoRA makes a new
    folder in ComfyUI's input folder; ?into=NAME adds to one that was made so. The answer has the name of the folder and
    the files that are `stored` and `refused`.

    Errors are {"error": a sentence} with a status of 4xx.
    """
    if (table := route_table()) is None:
        return
    routes = _DatasetRoutes(names, find)
    table.get("/sdxl_lora/datasets")(answering(routes.datasets))
    table.get("/sdxl_lora/dataset")(answering(routes.listing))
    table.get("/sdxl_lora/dataset/thumbnail")(answering(routes.thumbnail))
    table.post("/sdxl_lora/dataset/caption")(answering(routes.caption))
    table.post("/sdxl_lora/dataset/upload")(answering(routes.upload))


class _DatasetRoutes:
    def __init__(self, names: Callable[[], list[str]], find: Callable[[str], Path]) -> None:
        self._names, self._find = names, find
        self._captions, self._uploads = CaptionWriter(), Uploads()
        self._readers = ThreadPoolExecutor(2, "thumbnails")
        self._writer = ThreadPoolExecutor(1, "dataset changes")  # one change after the other

    async def datasets(self, _: Request) -> Response:
        return json_answer(await self._in(self._readers, self._names))

    async def listing(self, request: Request) -> Response:
        word = request.query.get("trigger_word", "")
        try:
            folder = self._folder(request.query.get("folder", ""))
            return json_answer(await self._in(self._readers, listing, folder, word))
        except (OSError, ValueError) as error:  # of a folder that a workflow names: the node shows it
            return json_answer({"error": brief(error)})

    async def thumbnail(self, request: Request) -> Response:
        from aiohttp.web import Response

        folder = self._folder(request.query.get("folder", ""))
        data = await self._in(self._readers, thumbnail, folder, request.query.get("image", ""))
        return Response(body=data, content_type="image/jpeg", headers={"Cache-Control": "no-cache"})

    async def caption(self, request: Request) -> Response:
        wanted = await json_body(request, _CAPTION, MAX_CAPTION_REQUEST)
        folder = self._own_folder(wanted["folder"])
        path, previous = await self._in(self._writer, self._captions.write, folder, wanted["image"], wanted["text"])
        return json_answer({"caption_file": path.relative_to(folder).as_posix(), "previous": previous})

    async def upload(self, request: Request) -> Response:
        _require_upload(request)
        target = self._target(request)
        stored: list[str] = []
        refused: list[dict[str, str]] = []
        parts = await request.multipart()
        while (part := await _next_part(parts)) is not None:
            if len(stored) + len(refused) == MAX_UPLOAD_FILES:
                raise Refused(
                    413, f"the request has more than {MAX_UPLOAD_FILES} files: send the others in another one"
                )
            name = getattr(part, "filename", None) or ""
            try:
                target, file = await self._store(target, name, part)
                stored.append(file)
            except (OSError, ValueError) as error:
                refused.append({"file": name, "reason": brief(error)})
        if not stored:
            raise Refused(400, refused[0]["reason"] if refused else "the request has no files: drop some on the node")
        return json_answer({"folder": Path(target).name, "stored": stored, "refused": refused})

    def _target(self, request: Request) -> str | Path:
        """The folder to upload to, or the name of a new one."""
        new, known = request.query.get("folder"), request.query.get("into")
        if (new is None) == (known is None):
            raise Refused(400, "give either folder, the name of a new folder, or into, that of one made by an upload")
        if known is not None:
            return self._uploads.find_folder(input_folder(), known)
        check_folder_name(new or "")
        return new or ""

    async def _store(self, target: str | Path, name: str, part: BodyPartReader) -> tuple[Path, str]:
        """Stores a file once it is whole and can be used; a new folder is made for the first one."""
        if re.search(r'filename="?[/\\]', part.headers.get("Content-Disposition", "")):
            raise ValueError(f"{shown(name)} has an absolute path: give one relative to the folder")
        limit = upload_limit(name)
        temporary = temporary_beside(input_folder() / "upload")
        try:
            await _receive(part, temporary, limit, name)
            return await self._in(self._writer, self._keep, target, name, temporary)
        finally:
            temporary.unlink(missing_ok=True)

    def _keep(self, target: str | Path, name: str, temporary: Path) -> tuple[Path, str]:
        check_upload(name, temporary)
        folder = self._uploads.new_folder(input_folder(), target) if isinstance(target, str) else target
        return folder, self._uploads.add(folder, name, temporary)

    def _folder(self, name: str) -> Path:
        folder = self._find(name)
        if not folder.is_dir():
            raise ValueError(f"{shown(name)} is not a folder: choose a dataset")
        return folder

    def _own_folder(self, name: str) -> Path:
        """The folder of a dataset that may be changed."""
        folder = self._folder(name)
        try:
            return own_dataset_folder(folder)
        except ValueError as error:
            raise Refused(403, str(error)) from error

    async def _in(self, pool: ThreadPoolExecutor, work: Callable[..., Any], *values: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(pool, work, *values)


def _require_upload(request: Request) -> None:
    if UPLOAD_HEADER not in request.headers:
        raise Refused(403, f"the header {UPLOAD_HEADER} is missing: files are uploaded from ComfyUI's page")
    if request.content_type != "multipart/form-data":
        raise Refused(415, f"the request is of type {shown(request.content_type)}: send multipart/form-data")
    require_length(request, MAX_UPLOAD_REQUEST)


async def _next_part(parts: MultipartReader) -> BodyPartReader | None:
    from aiohttp import http_exceptions

    try:
        return await parts.next()
    except (ValueError, http_exceptions.HttpProcessingError) as error:
        raise Refused(400, f"the request is damaged or cut off: {brief(error)}") from error


async def _receive(part: BodyPartReader, file: Path, limit: int, name: str) -> None:
    size = 0
    with open(file, "xb") as target:
        while chunk := await part.read_chunk(2**18):
            size += len(chunk)
            if size > limit:
                raise ValueError(f"{shown(name)} is larger than {limit // 1024} KiB: make it smaller")
            target.write(chunk)
