"""Human Compare and its routes, without ComfyUI: what is shown, stored, waited for and refused."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdxl_lora_core.evaluation.ballot import Ballot, append_vote, make_ballot, read_ballot, read_votes
from sdxl_lora_core.evaluation.comparison import Comparison
from sdxl_lora_core.lora.stack import LoRARef
from tests.evaluation.test_ballot import comparison, elect
from tests.nodes.fake_comfyui import fake_routes
from tools.run_workflow import load_pack

PACK = load_pack()
NODE: Any = PACK.NODE_CLASS_MAPPINGS["HumanCompare"]
host = PACK.nodes.host


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDXL_LORA_HOME", str(tmp_path))
    return tmp_path


def with_lora() -> Comparison:
    found = comparison(prompts=10, seeds=1)
    lora = LoRARef(Path("x"), "good.safetensors", 0.8, 0.5)
    results = list(found.results)
    object.__setattr__(results[1].variant, "loras", (lora,))
    return found


def test_the_ranking_and_the_best_loras_come_with_the_votes(home: Path) -> None:
    found = with_lora()
    first = NODE().rank(found, "vote", 0)
    assert "Open the page to vote." in first["result"][0]
    assert isinstance(first["result"][1], host.comfy.Nothing) and isinstance(first["result"][2], host.comfy.Nothing)
    assert first["ui"]["sdxl_lora_vote"] == [{"name": "vote", "page": "/sdxl_lora/vote/vote"}]
    elect(read_ballot(home / "votes", "vote"), "ann", {"base": 1, "good": 2, "bad": 0})
    ranking, best, chart, report = NODE().rank(found, "vote", 0)["result"]
    assert best == [("good.safetensors", 0.8, 0.5)] and chart.shape[0] == 1
    assert "good is" in ranking and json.loads(report)["votes"] == 30
    assert NODE.IS_CHANGED() != NODE.IS_CHANGED(), "votes come in at any time"


def test_it_waits_for_votes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PACK.nodes.human_compare, "_SECONDS", 0.01)
    found, done = comparison(), []
    waiting = threading.Thread(target=lambda: done.append(NODE().rank(found, "waits", 24)["result"][0]))
    waiting.start()
    while not (home / "votes/waits/ballot.json").exists():
        pass
    ballot = read_ballot(home / "votes", "waits")
    elect(ballot, "ann", {"base": 1, "good": 2, "bad": 0}, count=20)
    waiting.join(0.1)
    assert waiting.is_alive() and not done
    elect(ballot, "ann", {"base": 1, "good": 2, "bad": 0})
    waiting.join(10)
    assert done and done[0].startswith("24 votes by 1 raters")


def test_writing_its_images_can_be_cancelled(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cancel(_: Any, done: int, total: int, phase: str = "") -> None:
        if (done, total, phase) == (3, 24, "writing images"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(host.progress.Progress, "__call__", cancel)
        NODE().rank(comparison(), "vote", 0)
    assert not (home / "votes/vote/ballot.json").exists()
    assert NODE().rank(comparison(), "vote", 0)["ui"]["sdxl_lora_vote"][0]["name"] == "vote"
    assert len(list((home / "votes/vote/images").iterdir())) == 24


# Routes


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch, home: Path) -> dict[str, Any]:
    added = fake_routes(monkeypatch)
    monkeypatch.setitem(sys.modules, "folder_paths", SimpleNamespace(get_output_directory=lambda: str(home)))
    web = SimpleNamespace(
        json_response=lambda body, status: (status, json.loads(json.dumps(body))),
        FileResponse=lambda path: (200, path),
        Response=lambda **values: (200, values),
    )
    monkeypatch.setitem(sys.modules, "aiohttp.web", web)
    host.vote_routes.add_vote_routes()
    return added


@pytest.fixture
def ballot(home: Path) -> Ballot:
    return make_ballot(comparison(), home / "votes", "vote")


def get(routes: dict[str, Any], path: str, name: str = "vote", image: str = "", **query: str) -> Any:
    handler = routes[f"GET /sdxl_lora/vote/{{name}}{path}"]
    request = SimpleNamespace(match_info={"name": name, "image": image}, query=query, headers={})
    return asyncio.run(handler(request))


def post(routes: dict[str, Any], body: Any, name: str = "vote", kind: str = "application/json") -> Any:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def read() -> bytes:
        return data

    request = SimpleNamespace(match_info={"name": name}, content_type=kind, content_length=len(data), read=read)
    return asyncio.run(routes["POST /sdxl_lora/vote/{name}"](request))


def test_a_rater_sees_every_pair_once(routes: dict[str, Any], ballot: Ballot) -> None:
    status, pair = get(routes, "/pair", rater="ann")
    seen = []
    while not pair["finished"]:
        assert set(pair) == {"finished", "number", "prompt", "images", "next_images", "done", "total"}
        assert pair["done"] == len(seen) and pair["total"] == 24
        seen.append((pair["prompt"], frozenset(pair["images"])))
        status, pair = post(routes, {"rater": "ann", "number": pair["number"], "choice": "left"})
        assert status == 200
    assert len(set(seen)) == 24 and len(read_votes(ballot)) == 24
    assert get(routes, "/pair", rater="ann")[1] == {"finished": True, "done": 24, "total": 24}
    assert get(routes, "/pair", rater="bob")[1]["done"] == 0


def test_nothing_that_the_page_gets_tells_the_variant(routes: dict[str, Any], ballot: Ballot) -> None:
    answers = [get(routes, "/pair", rater="ann"), post(routes, {"rater": "ann", "number": 0, "choice": "tie"})]
    page = get(routes, "")[1]["body"].decode()
    for text in (json.dumps(answers), page):
        assert not [name for name in ballot.variants if f'"{name}"' in text] and ballot.secret not in text


def test_an_image_is_served_by_its_name_only(routes: dict[str, Any], ballot: Ballot) -> None:
    name = get(routes, "/pair", rater="ann")[1]["images"][0]
    assert get(routes, "/image/{image}", image=name)[1] == ballot.folder / f"images/{name}.png"
    assert get(routes, "/image/{image}", image="../ballot")[0] == 404


def test_the_last_vote_can_be_changed(routes: dict[str, Any], ballot: Ballot) -> None:
    post(routes, {"rater": "ann", "number": 0, "choice": "left"})
    status, pair = get(routes, "/pair", rater="ann", number="0")
    assert status == 200 and pair["number"] == 0 and pair["done"] == 1
    post(routes, {"rater": "ann", "number": 0, "choice": "right"})
    assert [vote.choice for vote in read_votes(ballot)] == ["right"]


def test_the_ranking_so_far(routes: dict[str, Any], ballot: Ballot) -> None:
    append_vote(ballot, ballot.vote("ann", ballot.pairs_for("ann")[0], "tie"))
    status, report = get(routes, "/ranking")
    assert status == 200 and report["votes"] == 1 and report["raters"] == {"ann": 1}


GOOD = {"rater": "ann", "number": 0, "choice": "left"}


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        ({**GOOD, "choice": "both"}, 400, "choice is 'both': give left, right, tie"),
        ({**GOOD, "rater": ""}, 400, "rater is ''"),
        ({**GOOD, "rater": "x" * 100}, 400, "rater is"),
        ({**GOOD, "number": 24}, 404, "there is no pair 24: the vote has 24"),
        ({**GOOD, "number": -1}, 404, "there is no pair -1"),
        ({**GOOD, "number": True}, 400, "number is True: give a whole number"),
        ({**GOOD, "number": "0"}, 400, "number is '0': give a whole number"),
        ({**GOOD, "more": 1}, 400, "send an object with rater, number and choice"),
        ([GOOD], 400, "send an object"),
        (b"{", 400, "the request is no JSON"),
        (b"x" * 5000, 413, "the most are 4096"),
    ],
)
def test_bad_votes_are_refused_by_a_sentence(
    routes: dict[str, Any], ballot: Ballot, body: Any, status: int, sentence: str
) -> None:
    found = post(routes, body)
    assert found[0] == status and sentence in found[1]["error"]
    assert not read_votes(ballot)


def test_a_form_of_another_site_cannot_vote(routes: dict[str, Any], ballot: Ballot) -> None:
    assert post(routes, GOOD, kind="text/plain")[0] == 415 and not read_votes(ballot)


def test_a_vote_that_cannot_be_stored_is_said(
    routes: dict[str, Any], ballot: Ballot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sdxl_lora_nodes_pack.sdxl_lora_core.evaluation.ballot.flush_to_disk", full)
    status, answer = post(routes, GOOD)
    assert status == 507 and answer["error"] == "the vote could not be stored: No space left on device"


@pytest.mark.parametrize("name", ["gone", "..", "../vote", "vote/images", "/etc", "C:\\x", "", "vote\0", "x" * 300])
def test_names_of_no_vote(routes: dict[str, Any], ballot: Ballot, name: str) -> None:
    for path in ("", "/pair", "/ranking"):
        assert get(routes, path, name=name, rater="ann")[0] in (400, 404)
    assert post(routes, GOOD, name=name)[0] in (400, 404)


@pytest.mark.parametrize("number", ["-1", "x", "99", "1" * 20, "²"])
def test_numbers_of_no_pair(routes: dict[str, Any], ballot: Ballot, number: str) -> None:
    assert get(routes, "/pair", rater="ann", number=number)[0] in (400, 404)
    assert get(routes, "/pair")[0] == 400
