"""Whether the pack runs in ComfyUI, and small parts of its API for nodes."""

from __future__ import annotations

import sys
from typing import Any


def running() -> bool:
    """Whether ComfyUI has loaded this pack. If its folder is merely on sys.path, none of it may be imported."""
    return "folder_paths" in sys.modules


class Nothing:
    """The substitute for ComfyUI's ExecutionBlocker: a node that receives it does not run."""


def nothing() -> Any:
    """An output that prevents the nodes connected to it from running."""
    if not running():
        return Nothing()
    from comfy_execution.graph_utils import ExecutionBlocker

    return ExecutionBlocker(None)


def metadata(graph: dict[str, Any]) -> dict[str, Any] | None:
    """The graph to write into image files; None if ComfyUI was started with --disable-metadata."""
    if not running():
        return graph
    from comfy.cli_args import args

    return None if args.disable_metadata else graph
