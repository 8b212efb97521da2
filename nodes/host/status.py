"""What each node of the pack does or did last: sent to every open page, and kept for pages that open later."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .comfy import running

State = Literal["running", "done", "cancelled", "failed"]

EVENT = "sdxl_lora.status"
SECONDS = 0.25  # between two messages of a node
REMEMBERED = 100  # nodes


@dataclass
class NodeStatus:
    """`done` of `total` items of a phase, by a node in a prompt of a workflow.

    `workflow` is the id of the workflow's graph, None if the prompt came without one. `node` has the ids from the
    outermost subgraph to the node, joined by colons. `message` is a note while the node runs, or the error that ended
    it. `numbers` are those of the last training step, by their names in StepReport. `run` is the name of the training's
    folder, `points` are its steps since the last message: step, loss, moving average of the loss, learning rate,
    validation loss.
    """

    workflow: str | None
    prompt: str
    node: str
    state: State = "running"
    phase: str = ""
    done: int = 0
    total: int = 0
    detail: str = ""
    message: str = ""
    run: str | None = None
    numbers: dict[str, float | None] = field(default_factory=dict)
    points: list[tuple[float | None, ...]] = field(default_factory=list)
    sent: float = 0.0

    def send(self, *, now: bool = False) -> None:
        """Tells the pages, unless the last message was less than SECONDS ago."""
        if not now and time.monotonic() - self.sent < SECONDS:
            return
        from server import PromptServer

        self.sent = time.monotonic()
        PromptServer.instance.send_sync(EVENT, self.as_json())
        self.points = []

    def as_json(self) -> dict[str, Any]:
        values = asdict(self)
        del values["sent"]
        return values


class StatusBoard:
    """The latest status of each node. Nodes write it while they run, the server's routes read it."""

    def __init__(self) -> None:
        self._statuses: dict[tuple[str | None, str], NodeStatus] = {}
        self._lock = threading.Lock()

    def begin(self) -> NodeStatus | None:
        """A new status of the node that runs; None if no node of a server runs, as in scripts."""
        status = _of_running_node()
        if status is None:
            return None
        with self._lock:
            self._statuses.pop((status.workflow, status.node), None)
            self._statuses[status.workflow, status.node] = status
            for oldest in list(self._statuses)[:-REMEMBERED]:
                del self._statuses[oldest]
        return status

    def all(self) -> list[dict[str, Any]]:
        """As JSON values, oldest first."""
        with self._lock:
            return [status.as_json() for status in self._statuses.values()]


board = StatusBoard()


def _of_running_node() -> NodeStatus | None:
    if not running() or "server" not in sys.modules:
        return None
    from comfy_execution.utils import get_executing_context
    from server import PromptServer

    context = get_executing_context()
    if context is None or not hasattr(PromptServer, "instance"):
        return None
    return NodeStatus(_workflow_of(context.prompt_id), context.prompt_id, context.node_id)


def _workflow_of(prompt: str) -> str | None:
    """The id of the workflow that the page sent along with a running prompt."""
    from server import PromptServer

    items, _ = PromptServer.instance.prompt_queue.get_current_queue()
    extra = next((item[3] for item in items if item[1] == prompt), {})
    workflow = (extra.get("extra_pnginfo") or {}).get("workflow") or {}
    return workflow.get("id")
