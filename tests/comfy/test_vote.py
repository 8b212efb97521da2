"""Human Compare in a real ComfyUI: votes clicked in Chromium, a server killed half-way, hostile requests, a phone."""

from __future__ import annotations

import http.client
import io
import json
import os
import shutil
import signal
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from tests.comfy.page import browser

PROMPTS = "\n".join(f"a {color} circle on a white background" for color in ("red", "blue", "green", "pink", "cyan"))
GRAPH: dict[str, Any] = {
    "1": {"class_type": "LoadSDXLBase", "inputs": {"base": "tiny-sdxl (bundled)", "precision": "auto"}},
    "2": {"class_type": "LoadImage", "inputs": {"image": "dark.png"}},
    "3": {"class_type": "LoadImage", "inputs": {"image": "light.png"}},
    "4": {"class_type": "RepeatImageBatch", "inputs": {"image": ["2", 0], "amount": 10}},
    "5": {"class_type": "RepeatImageBatch", "inputs": {"image": ["3", 0], "amount": 10}},
    "6": {"class_type": "CompareVariant", "inputs": {"name": "dark", "settings": "", "images": ["4", 0]}},
    "7": {
        "class_type": "CompareVariant",
        "inputs": {"name": "light", "settings": "", "images": ["5", 0], "variants": ["6", 0]},
    },
    "8": {
        "class_type": "CompareLoRAs",
        "inputs": {
            **{"base": ["1", 0], "prompt": PROMPTS, "seed": 3, "count": 2, "steps": 1, "guidance": 1.0, "width": 64},
            **{"height": 64, "columns": "", "rows": "", "clip_model": "tiny-clip (bundled)", "image_model": "(none)"},
            **{"save_as": "compared", "variants": ["7", 0]},
        },
    },
    "9": {"class_type": "HumanCompare", "inputs": {"comparison": ["8", 6], "save_as": "vote", "wait_for": 0}},
}
# The mean brightness of the image that a side shows, 0 to 255.
BRIGHTNESS = """async (side) => {
  const image = new Image();
  image.src = getComputedStyle(document.getElementById(side)).backgroundImage.slice(5, -2);
  await image.decode();
  const canvas = new OffscreenCanvas(1, 1);
  const paper = canvas.getContext("2d");
  paper.drawImage(image, 0, 0, 1, 1);
  return paper.getImageData(0, 0, 1, 1).data[0];
}"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "input").mkdir()
    for name, grey in {"dark": 30, "light": 220}.items():
        Image.new("RGB", (64, 64), (grey, grey, grey)).save(tmp_path / f"input/{name}.png")
    return tmp_path


@pytest.fixture
def chromium() -> Iterator[Any]:
    with browser() as found:
        yield found


def voting(chromium: Any, server: Any, rater: str, **options: Any) -> Any:
    """The voting page after its first screen."""
    page = chromium.new_page(**options)
    page.goto(f"{server.url}/sdxl_lora/vote/vote")
    page.get_by_placeholder("Your name").fill(rater)
    page.keyboard.press("Enter")
    page.wait_for_selector("main:not([hidden])")
    return page


def vote_for_the_lighter(page: Any, count: int, clicking: bool = False) -> None:
    """With the keys 1, 2 and space, or by clicking; no difference where both are alike."""
    for _ in range(count):
        before = page.inner_text("#count")
        left, right = (page.evaluate(BRIGHTNESS, side) for side in ("left", "right"))
        choice = "tie" if abs(left - right) < 10 else "left" if left > right else "right"
        if clicking:
            page.click(f"#{choice}")
        else:
            page.keyboard.press({"left": "1", "right": "2", "tie": " "}[choice])
        page.wait_for_function("(before) => document.getElementById('count').textContent !== before", arg=before)


def lines(home: Path) -> list[dict[str, Any]]:
    text = (home / "output/votes/vote/votes.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_forty_votes_with_the_server_killed_half_way(
    home: Path, chromium: Any, start_server: Callable[..., AbstractContextManager[Any]]
) -> None:
    with start_server(home) as server:
        shown = server.run(GRAPH)["9"]
        assert shown["sdxl_lora_vote"] == [{"name": "vote", "page": "/sdxl_lora/vote/vote"}]
        page = voting(chromium, server, "ann")
        assert page.inner_text("#prompt") in PROMPTS.splitlines()
        assert not {"dark", "light", "base"} & set(page.inner_text("body").split())
        vote_for_the_lighter(page, 20)
        os.kill(server.pid, signal.SIGKILL)
        assert len(lines(home)) == 20
        page.keyboard.press("1")
        page.wait_for_selector("#error:not([hidden])")
        assert "The server does not answer" in page.inner_text("#error") and page.inner_text("#count") == "20 of 30"
        page.close()
    shutil.rmtree(home / "custom_nodes/sdxl-lora-nodes")
    with start_server(home) as server:
        page = voting(chromium, server, "ann")
        assert page.inner_text("#count") == "20 of 30", "after the restart she goes on where she was"
        vote_for_the_lighter(page, 10)
        assert "That was the last pair" in page.inner_text("#message")
        page.close()
        page = voting(chromium, server, "bob")
        vote_for_the_lighter(page, 10, clicking=True)
        votes = lines(home)
        assert len(votes) == 40 and len({(v["rater"], v["prompt"], v["seed"], v["left"] < v["right"]) for v in votes})
        assert sum(v["rater"] == "ann" for v in votes) == 30
        shades = {"dark": 0, "base": 1, "light": 2}
        wrong = [v for v in votes if {v["left"], v["right"]} == {"dark", "light"} and v["choice"] == "tie"]
        assert not wrong
        for one in votes:
            if {one["left"], one["right"]} == {"dark", "light"}:
                lighter = "left" if shades[one["left"]] > shades[one["right"]] else "right"
                assert one["choice"] == lighter
        ranking = server.get("/sdxl_lora/vote/vote/ranking")
        names = [row["name"] for row in ranking["ranking"]]
        assert ranking["votes"] == 40 and names.index("light") < names.index("dark")
        again = server.run(GRAPH)["9"]
        assert again["text"][0].startswith("40 votes by 2 raters; 30 pairs")


def answer(server: Any, path: str, method: str = "GET", body: bytes = b"", kind: str = "") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
    try:
        connection.putrequest(method, path, skip_host=False)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body))}.items():
            if value:
                connection.putheader(name, value)
        connection.endheaders()
        connection.send(body)
        found = connection.getresponse()
        return found.status, found.read()
    finally:
        connection.close()


def hostile_paths(image: str) -> list[str]:
    """Ways out of the folder of the vote, and to what is in it beside the images."""
    ends = [
        *(
            "ballot.json",
            "votes.jsonl",
            ".votes.lock",
            "..",
            "../ballot.json",
            "..%2fballot.json",
            "%2e%2e/ballot.json",
        ),
        *("..%5cballot.json", "....//ballot.json", "%00", f"{image}.png", f"{image}%00.png", f"../images/{image}.png"),
        *(f"{image}/", f"{image}/../../ballot.json", "/etc/passwd", "%2fetc%2fpasswd", "C:%5cWindows%5cwin.ini", "*"),
        *("a" * 5000, "%ff%fe", "?x", "#x", image[:-1], image.upper(), "%20", "con", "file:%2f%2f%2fetc%2fpasswd"),
    ]
    names = [
        *("..", "%2e%2e", "..%2f..%2fuser", "vote%2fimages", "vote%2f..%2fvote", "vote%00", "%2fetc", ".", "~", "gone"),
        *(
            "vote%5c..%5c..",
            "a" * 300,
            "%ff",
            "vote.",
            "VOTE%2f..",
            "aux",
            "votes.jsonl",
            "%c0%ae%c0%ae",
            "vote%20%20x",
        ),
    ]
    return [f"/sdxl_lora/vote/vote/image/{end}" for end in ends] + [
        f"/sdxl_lora/vote/{name}{rest}" for name in names for rest in ("/ranking", "/pair?rater=x")
    ]


def test_nothing_but_the_images_of_the_vote_is_served(
    home: Path, start_server: Callable[..., AbstractContextManager[Any]]
) -> None:
    with start_server(home) as server:
        server.run(GRAPH)
        pair = server.get("/sdxl_lora/vote/vote/pair?rater=ann")
        image = pair["images"][0]
        status, data = answer(server, f"/sdxl_lora/vote/vote/image/{image}")
        assert status == 200 and np.asarray(Image.open(io.BytesIO(data))).shape == (64, 64, 3)
        secret = json.loads((home / "output/votes/vote/ballot.json").read_text())["secret"]
        paths = hostile_paths(image)
        assert len(paths) >= 50
        for path in paths:
            status, data = answer(server, path)
            assert 400 <= status < 500, (path, status)
            assert secret.encode() not in data and b"root:" not in data and b"rater" not in data[:40], path
        vote = json.dumps({"rater": "eve", "number": 0, "choice": "left"}).encode()
        assert answer(server, "/sdxl_lora/vote/vote", "POST", vote, "text/plain")[0] == 415
        assert answer(server, "/sdxl_lora/vote/..%2fvote", "POST", vote, "application/json")[0] in (400, 404)
        request = urllib.request.Request(
            f"{server.url}/sdxl_lora/vote/vote",
            vote,
            {"Content-Type": "application/json", "Origin": "http://evil.example"},
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=30)
        assert refused.value.code == 403, "a page of another site"
        assert not (home / "output/votes/vote/votes.jsonl").exists()


def test_nobody_votes_on_images_that_are_not_shown(
    home: Path, chromium: Any, start_server: Callable[..., AbstractContextManager[Any]]
) -> None:
    with start_server(home) as server:
        server.run(GRAPH)
        page = voting(chromium, server, "ann")
        page.route("**/image/**", lambda route: route.abort())
        first = page.evaluate("getComputedStyle(document.getElementById('left')).backgroundImage")
        for _ in range(3):  # of which the first votes, if the next images were loaded before that in the background
            page.keyboard.press("2")
            page.wait_for_timeout(500)
        assert "The server does not answer" in page.inner_text("#error")
        votes, count = len(lines(home)), page.inner_text("#count")
        assert 1 <= votes < 3
        page.unroute("**/image/**")
        page.keyboard.press("2")
        page.wait_for_function("(before) => document.getElementById('count').textContent !== before", arg=count)
        assert len(lines(home)) == votes and page.inner_text("#count") == f"{votes} of 30"
        assert page.evaluate("getComputedStyle(document.getElementById('left')).backgroundImage") != first
        page.keyboard.press("2")
        page.wait_for_function(f"() => document.getElementById('count').textContent === '{votes + 1} of 30'")
        page.close()


def test_on_a_phone_both_images_and_all_buttons_are_on_the_screen(
    home: Path, chromium: Any, start_server: Callable[..., AbstractContextManager[Any]], tmp_path: Path
) -> None:
    with start_server(home) as server:
        server.run(GRAPH)
        for width, height in ((390, 844), (844, 390), (1280, 800)):
            page = voting(
                chromium, server, f"phone {width}", viewport={"width": width, "height": height}, has_touch=True
            )
            boxes = [page.locator(f"#{name}").bounding_box() for name in ("left", "right", "tie", "back")]
            for box in boxes:
                assert box["width"] >= 44 and box["height"] >= 44
                assert box["x"] >= 0 and box["y"] >= 0
                assert box["x"] + box["width"] <= width and box["y"] + box["height"] <= height
            assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
            page.screenshot(path=tmp_path / f"vote_{width}.png")
            page.locator("#left").tap()
            page.wait_for_function("() => document.getElementById('count').textContent.startsWith('1 of')")
            page.locator("#back").tap()
            page.wait_for_function("() => document.getElementById('back').disabled")
            page.locator("#tie").tap()
            page.wait_for_function("() => !document.getElementById('back').disabled")
            assert lines(home)[-1]["choice"] == "tie"
            page.close()
