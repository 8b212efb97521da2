"""Stand-ins for ComfyUI's modules."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType
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
