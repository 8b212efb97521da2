from collections.abc import Mapping

class Request:
    match_info: Mapping[str, str]
    query: Mapping[str, str]

class Response: ...

def json_response(data: object, *, status: int = 200) -> Response: ...

class FileResponse:
    def __init__(self, path: object) -> None: ...
