from collections.abc import Mapping

from . import MultipartReader

class Transport:
    def is_closing(self) -> bool: ...

class Request:
    transport: Transport | None
    match_info: Mapping[str, str]
    query: Mapping[str, str]
    headers: Mapping[str, str]
    content_type: str
    content_length: int | None

    async def read(self) -> bytes: ...
    async def multipart(self) -> MultipartReader: ...

class Response:
    def __init__(self, *, body: bytes, content_type: str, headers: Mapping[str, str] = ...) -> None: ...

def json_response(data: object, *, status: int = 200) -> Response: ...

class FileResponse:
    def __init__(self, path: object) -> None: ...
