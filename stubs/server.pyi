from collections.abc import Callable
from typing import Any

class _Routes:
    def get(self, path: str) -> Callable[[Callable[[Any], Any]], Any]: ...
    def post(self, path: str) -> Callable[[Callable[[Any], Any]], Any]: ...

class _Queue:
    def get_current_queue(self) -> tuple[list[Any], list[Any]]: ...

class PromptServer:
    instance: PromptServer
    routes: _Routes
    prompt_queue: _Queue

    def send_sync(self, event: str, data: Any) -> None: ...
