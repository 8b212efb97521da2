from collections.abc import Callable
from typing import Any

class _Routes:
    def post(self, path: str) -> Callable[[Callable[[Any], Any]], Any]: ...

class PromptServer:
    instance: PromptServer
    routes: _Routes

    def send_progress_text(self, text: str, node_id: str) -> None: ...
