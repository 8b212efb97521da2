"""Stand-ins for ComfyUI's modules."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


def fake_modules(monkeypatch: pytest.MonkeyPatch, modules: Mapping[str, Any]) -> None:
    """Puts stand-ins where `import` finds them. With a `folder_paths` among them the pack takes ComfyUI for running."""
    for name, module in modules.items():
        package, _, inner = name.rpartition(".")
        if package:
            monkeypatch.setitem(sys.modules, package, sys.modules.get(package, ModuleType(package)))
            monkeypatch.setattr(sys.modules[package], inner, module, raising=False)
        monkeypatch.setitem(sys.modules, name, module)


def fake_routes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The handlers that are added to a stand-in of ComfyUI's server from now on, by "METHOD /path"."""
    added: dict[str, Any] = {}

    def route(method: str) -> Any:
        return lambda path: lambda handler: added.setdefault(f"{method} {path}", handler)

    table = SimpleNamespace(get=route("GET"), post=route("POST"))
    server = SimpleNamespace(PromptServer=SimpleNamespace(instance=SimpleNamespace(routes=table)))
    monkeypatch.setitem(sys.modules, "server", server)
    return added
