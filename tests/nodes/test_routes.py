"""The pack's routes, without ComfyUI: stop and keep, and what runs have done."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.nodes.fake_comfyui import fake_routes
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


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """The handlers that are added to ComfyUI's server, whose output folder is `tmp_path`."""
    added = fake_routes(monkeypatch)
    host.add_routes()
    assert added == {}, "a module named server is not yet ComfyUI"
    monkeypatch.setitem(sys.modules, "folder_paths", SimpleNamespace(get_output_directory=lambda: str(tmp_path)))
    json_response = lambda body, status: (status, json.loads(json.dumps(body)))  # noqa: E731
    monkeypatch.setitem(sys.modules, "aiohttp.web", SimpleNamespace(json_response=json_response))
    host.add_routes()
    return added


def ask(handler: Any, query: dict[str, str] | None = None, **match: str) -> tuple[int, Any]:
    return asyncio.run(handler(SimpleNamespace(query=query or {}, match_info=match)))


def test_the_route_answers_whether_something_is_stopped(routes: dict[str, Any]) -> None:
    stop = routes["POST /sdxl_lora/stop"]
    assert ask(stop) == (409, {"stopping": False})
    with host.stop_button.offered() as should_stop:
        assert ask(stop) == (200, {"stopping": True})
        assert should_stop()


def test_the_routes_of_runs(routes: dict[str, Any], tmp_path: Path) -> None:
    run = routes["GET /sdxl_lora/runs/{name}"]
    for number, name in enumerate(["cat", "cat_00001", "cats"]):
        (tmp_path / "lora_runs" / name).mkdir(parents=True)
        (tmp_path / "lora_runs" / name / "identity").write_text("{}")
        os.utime(tmp_path / "lora_runs" / name / "identity", (number, number))
    assert ask(routes["GET /sdxl_lora/runs"], {"series": "cat"}) == (200, ["cat_00001", "cat"])
    assert ask(routes["GET /sdxl_lora/runs"]) == (200, [])
    status, history = ask(run, name="cat")
    assert (status, history["name"], history["points"], history["finished"]) == (200, "cat", [], False)
    assert ask(run, name="dog")[0] == 404
    for hostile in ("..", "../lora_runs/cat", "/etc", "C:/x", "a\\b", "cat/", "con", "a" * 400, "a\0b"):
        status, answer = ask(run, name=hostile)
        assert status in (400, 404) and len(answer["error"]) > 15
