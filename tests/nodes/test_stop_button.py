"""Stop and keep on the training node, without ComfyUI."""

from __future__ import annotations

import asyncio
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from tools.run_workflow import load_pack

PACK = load_pack()
host = PACK.nodes.host.server


def test_the_button_stops_what_trains_and_nothing_else() -> None:
    button = host.StopButton()
    assert not button.press()
    with button.offered() as should_stop:
        assert not should_stop()
        assert button.press() and should_stop()
    assert not button.press()
    with button.offered() as should_stop:
        assert not should_stop(), "the next training is not stopped"


def test_a_training_that_fails_takes_its_button_along() -> None:
    button = host.StopButton()
    with pytest.raises(RuntimeError), button.offered():
        raise RuntimeError
    assert not button.press()


def test_the_route_answers_whether_something_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    routes: dict[str, Any] = {}

    def post(path: str) -> Any:
        return lambda handler: routes.setdefault(path, handler)

    def json_response(body: dict[str, Any], status: int) -> tuple[int, str]:
        return status, json.dumps(body)

    server = SimpleNamespace(PromptServer=SimpleNamespace(instance=SimpleNamespace(routes=SimpleNamespace(post=post))))
    monkeypatch.setitem(sys.modules, "server", server)
    host.add_routes()
    assert routes == {}, "a module named server is not yet ComfyUI"
    monkeypatch.setitem(sys.modules, "folder_paths", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "aiohttp.web", SimpleNamespace(json_response=json_response))
    host.add_routes()
    stop = routes["/sdxl_lora/stop"]
    assert asyncio.run(stop(None)) == (409, '{"stopping": false}')
    with host.stop_button.offered() as should_stop:
        assert asyncio.run(stop(None)) == (200, '{"stopping": true}')
        assert should_stop()
