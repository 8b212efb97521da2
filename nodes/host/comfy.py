"""Whether ComfyUI runs, and the small things that nodes take from its graph."""

from __future__ import annotations

import sys
from typing import Any


def running() -> bool:
    """Whether ComfyUI loaded this pack. Where only its folder is on sys.path nothing of it may be imported."""
    return "folder_paths" in sys.modules


class Nothing:
    """Stands in for ComfyUI's ExecutionBlocker: a node that receives it does not run."""


def nothing() -> Any:
    """The output that keeps whatever hangs on it from running."""
    if not running():
        return Nothing()
    from comfy_execution.graph_utils import ExecutionBlocker

    return ExecutionBlocker(None)


def metadata(graph: dict[str, Any]) -> dict[str, Any] | None:
    """The graph, for files that say how they were made; None where the user started ComfyUI with --disable-metadata."""
    if not running():
        return graph
    from comfy.cli_args import args

    return None if args.disable_metadata else graph
