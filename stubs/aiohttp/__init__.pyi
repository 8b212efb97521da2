from collections.abc import Mapping

class BodyPartReader:
    filename: str | None
    headers: Mapping[str, str]

    async def read_chunk(self, size: int = ...) -> bytes: ...

class MultipartReader:
    async def next(self) -> BodyPartReader | None: ...
