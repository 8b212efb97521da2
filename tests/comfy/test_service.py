"""The pack without a browser, in a real ComfyUI: README's example, the plain route, and all that may go wrong."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"base": "tiny-sdxl (bundled)", "steps": 1, "guidance": 1.0, "width": 64, "height": 64}


def ask(url: str, body: Any, kind: str = "application/json", timeout: float = 120) -> tuple[int, bytes]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/sdxl_lora/generate", data, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def sentence(answer: tuple[int, bytes]) -> tuple[int, str]:
    return answer[0], json.loads(answer[1])["error"]


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


# README's example


def example() -> str:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("## Use it as a service")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    return code


def test_the_readmes_example_shows_progress_and_fetches_the_images(server: Any, tmp_path: Path) -> None:
    (tmp_path / "example_workflows").symlink_to(ROOT / "example_workflows")
    code = example().replace("http://127.0.0.1:8188", server.url).replace('["steps"] = 60', '["steps"] = 12')
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"3 training \d+ of 12 loss", done.stdout), done.stdout
    files = list(tmp_path.glob("*.png"))
    assert len(files) > 8 and all(Image.open(file).size[0] >= 64 for file in files)


def test_the_readmes_way_to_cancel(server: Any) -> None:
    graph = json.loads((ROOT / "example_workflows/api/train_and_compare.json").read_text(encoding="utf-8"))
    graph["3"]["inputs"] |= {"steps": 5000, "lora_name": "cancelled_by_a_program"}
    prompt = server.queue(graph)

    def trains() -> bool:
        nodes = [node for node in server.get("/sdxl_lora/status") if node["prompt"] == prompt]
        return any(node["phase"] == "training" and node["done"] > 1 for node in nodes)

    server.wait(trains, 120)
    server.post("/interrupt", {"prompt_id": prompt})
    entry = server.finished(prompt, 60)
    assert "execution_interrupted" in [name for name, _ in entry["status"]["messages"]]
    waiting = [server.queue(graph) for _ in range(2)]
    server.post("/queue", {"delete": [waiting[1]]})
    server.post("/interrupt", {"prompt_id": waiting[0]})
    server.wait(lambda: not sum(map(len, server.get("/queue").values())), 60)


# The plain route


def test_an_image_is_that_of_the_node(server: Any) -> None:
    loras = [{"name": "8bit_style (bundled)", "strength_model": 0.8}, ["line_style (bundled)", 0.5, 0.0]]
    body = {**SMALL, "prompt": "a red circle", "negative_prompt": "blue", "seed": 41, "steps": 2, "guidance": 4.0}
    status, png = ask(server.url, {**body, "loras": loras})
    assert status == 200 and png[:8] == b"\x89PNG\r\n\x1a\n"
    status, found = ask(server.url, {**body, "loras": loras, "format": "json", "count": 2})
    images = json.loads(found)["images"]
    assert [image["seed"] for image in images] == [41, 42] and images[0]["from_cache"] is True
    assert base64.b64decode(images[0]["png"]) == png or np.array_equal(
        pixels(base64.b64decode(images[0]["png"])), pixels(png)
    )
    assert ask(server.url, {**body, "loras": loras})[1] == png, "the same request again"
    graph = {
        "1": {"class_type": "LoadSDXLBase", "inputs": {"base": SMALL["base"], "precision": "auto"}},
        "2": {
            "class_type": "SDXLGenerateCached",
            "inputs": {
                **{key: value for key, value in body.items() if key != "base"},
                **{"base": ["1", 0], "count": 1, "sampler": "dpmpp_2m", "scheduler": "karras", "cache": "use"},
            },
        },
    }
    (shown,) = server.run(graph)["2"]["images"]
    query = f"/view?filename={shown['filename']}&subfolder={shown['subfolder']}&type=temp"
    with urllib.request.urlopen(server.url + query) as answer:
        own = pixels(answer.read())
    assert np.array_equal(pixels(ask(server.url, body)[1]), own)


def test_what_comfyui_repeats_is_from_the_cache_and_survives_a_cleaned_folder(server: Any) -> None:
    body = {**SMALL, "prompt": "a square", "seed": 52, "format": "json"}

    def ask_json() -> dict[str, Any]:
        status, found = ask(server.url, body)
        assert status == 200
        return json.loads(found)["images"][0]

    first, second = ask_json(), ask_json()
    assert first["from_cache"] is False and first["seconds"] > 0
    assert second == {**first, "from_cache": True, "seconds": 0}
    previews = sorted((server.base / "temp/sdxl_lora").glob("*.png"), key=lambda file: file.stat().st_mtime)
    previews[-1].unlink()
    third = ask_json()
    assert third["from_cache"] is True
    assert np.array_equal(pixels(base64.b64decode(third["png"])), pixels(base64.b64decode(first["png"])))


def test_health(server: Any) -> None:
    found = server.get("/sdxl_lora/health")
    assert found["status"] == "ok" and found["device"] == "cpu"
    assert set(found["queue"]) == {"running", "waiting", "most_waiting"} and found["libraries"]["torch"]


GOOD = {**SMALL, "prompt": "a star", "seed": 1}
# Each with its status and a part of its sentence.
BAD: list[tuple[Any, int, str]] = [
    *[({**GOOD, name: value}, 422, f"{name} is") for name, values in {
        "steps": [0, 1001, -1, 2.5, "x", None, [1], {}], "width": [0, 63, 65, 8200, "x", None, [64]],
        "height": [0, 100_000, 66, "y", None], "guidance": [-1, 101, "x", None], "seed": [-1, 2**64, "s", None, 1.5],
        "count": [0, 2000, "x", None], "sampler": ["best", "", 3, None], "scheduler": ["x", None, 1],
        "denoise": [0, 2, "x"], "batch_size": [0, 65], "hires_scale": [0.5, 5], "prompt_syntax": ["x"],
        "format": ["jpg", "", 1, None], "timeout": [0, -1, "x", None, True, 1e9, [1], 10**400],
        "precision": ["fp8", 16, None],
        "loras": ["a", 3, {"name": "x"}, None], "cache": ["x", None], "keep_latents": ["x"],
    }.items() for value in values],
    *[({**GOOD, name: 1}, 422, "unknown setting") for name in ("stepz", "n_iter", "sampler_name", "__class__", "")],
    *[({**GOOD, "base": name}, 404, "was not found") for name in ("gone", "gone.safetensors", "a/b/c")],
    *[({**GOOD, "base": name}, 422, "") for name in ("../../etc/passwd", 3, None, ["x"], {})],
    *[({**GOOD, "loras": [entry]}, 404, "was not found") for entry in ({"name": "gone"}, ["gone", 1.0])],
    *[({**GOOD, "loras": [entry]}, 422, "") for entry in (
        {"name": "x", "huh": 1}, {"name": "x", "strength": "y"}, {"name": "x", "strength": 10**400}, 3
    )],
    ({key: value for key, value in GOOD.items() if key != "base"}, 422, "base is missing: give the name of one"),
    ({**GOOD, "count": 3}, 422, "3 images are requested: set format to json"),
    ({**GOOD, "prompt": 3}, 422, "prompt is"),
    ({**GOOD, "sampler": "ddim", "scheduler": "karras"}, 422, "does not support"),
    ({**GOOD, "cache": "only", "seed": 987654321}, 409, "cache is 'only'"),
    (b"", 400, "no JSON"), (b"{", 400, "no JSON"), (b"[]", 400, "send an object"), (b"null", 400, "send an object"),
    (b'"x"', 400, "send an object"), (b"\xff\xfe", 400, "no JSON"), (b"[" * 100_000, 400, ""),
    (b"{" + b" " * 300_000 + b"}", 413, "the most are"),
]  # fmt: skip


def test_bad_requests_get_a_status_and_a_sentence(server: Any) -> None:
    assert len(BAD) >= 100
    for body, status, part in BAD:
        found = sentence(ask(server.url, body))
        assert found[0] == status and part in found[1], (body if len(str(body)) < 500 else "long", found)
        assert len(found[1]) > 10 and "Traceback" not in found[1]
    assert sentence(ask(server.url, GOOD, kind="text/plain"))[0] == 415
    assert sentence(ask(server.url, GOOD, kind="application/x-www-form-urlencoded"))[0] == 415
    assert ask(server.url, GOOD)[0] == 200, "and then it goes on"


def test_a_lora_for_another_base_is_refused_while_it_runs(server: Any) -> None:
    from safetensors.torch import save_file
    from torch import zeros

    key = "lora_unet_input_blocks_99_1_transformer_blocks_0_attn1_to_q"
    path = server.base / "models/loras/foreign.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file({f"{key}.lora_down.weight": zeros(2, 4), f"{key}.lora_up.weight": zeros(4, 2)}, path)
    status, text = sentence(ask(server.url, {**GOOD, "loras": [{"name": "foreign.safetensors"}]}))
    assert status == 409 and "foreign" in text


def test_eight_clients_with_fifty_requests_each(
    start_server: Callable[..., AbstractContextManager[Any]], tmp_path: Path
) -> None:
    """Every answer is the image that was asked for, nothing is made twice, and each client's answers are in order."""
    with start_server(tmp_path) as server:

        def client(number: int) -> list[tuple[int, bytes]]:
            return [ask(server.url, {**GOOD, "seed": 1000 * number + turn}) for turn in range(50)]

        with ThreadPoolExecutor(8) as clients:
            answers = list(clients.map(client, range(8)))
        assert all(status == 200 for rows in answers for status, _ in rows)
        images = [pixels(data).tobytes() for rows in answers for _, data in rows]
        assert len(set(images)) == 400
        manifests = list((tmp_path / "user/sdxl_lora/images").rglob("*.png"))
        assert len(manifests) == 400, "each image once in the cache"
        history = server.get("/history?max_items=1000")
        numbers = [entry["prompt"][0] for entry in history.values()]
        assert len(numbers) == 400 and numbers == sorted(numbers), "in the order of the queue"
        again = ask(server.url, {**GOOD, "seed": 3007, "format": "json"})
        assert json.loads(again[1])["images"][0]["from_cache"] is True


@pytest.fixture
def narrow_queue(
    start_server: Callable[..., AbstractContextManager[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    """A server whose queue is full with two waiting prompts."""
    monkeypatch.setenv("SDXL_LORA_MOST_WAITING", "2")
    with start_server(tmp_path) as server:
        yield server


SLOW = {**GOOD, "steps": 400, "cache": "off"}


def test_a_full_queue_a_timeout_and_a_client_that_hangs_up(narrow_queue: Any) -> None:
    server = narrow_queue
    assert ask(server.url, GOOD)[0] == 200
    with ThreadPoolExecutor(4) as clients:
        first = clients.submit(ask, server.url, SLOW)
        server.wait(lambda: server.get("/sdxl_lora/health")["queue"]["running"] == 1, 30)
        gone = hang_up(server)
        server.wait(lambda: server.get("/sdxl_lora/health")["queue"]["waiting"] == 1, 30)
        second = clients.submit(ask, server.url, {**GOOD, "seed": 2})
        server.wait(lambda: server.get("/sdxl_lora/health")["queue"]["waiting"] == 2, 30)
        status, text = sentence(ask(server.url, {**GOOD, "seed": 3}))
        assert (status, text) == (503, "2 prompts are waiting: try again later, or on another server")
        gone.close()
        server.wait(lambda: server.get("/sdxl_lora/health")["queue"]["waiting"] == 1, 30)
        status, text = sentence(ask(server.url, {**SLOW, "seed": 4, "timeout": 1}))
        assert status == 504 and "not finished within 1 s" in text
        assert first.result(120)[0] == 200 and second.result(120)[0] == 200
    status, text = sentence(ask(server.url, {**SLOW, "steps": 1000, "seed": 5, "timeout": 1}))
    assert status == 504, "while it runs"
    server.wait(lambda: not any(server.get("/sdxl_lora/health")["queue"][kind] for kind in ("running", "waiting")), 30)
    assert ask(server.url, {**GOOD, "seed": 6})[0] == 200


def hang_up(server: Any) -> socket.socket:
    """A request whose sender is about to go."""
    host = urlsplit(server.url)
    connection = socket.create_connection((host.hostname or "", host.port or 80), timeout=30)
    body = json.dumps({**GOOD, "seed": 77}).encode()
    head = f"POST /sdxl_lora/generate HTTP/1.1\r\nHost: {host.netloc}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def test_a_job_that_is_removed_or_cancelled_in_comfyui_is_answered(server: Any) -> None:
    with ThreadPoolExecutor(2) as clients:
        running = clients.submit(ask, server.url, {**SLOW, "seed": 11})
        server.wait(lambda: server.get("/sdxl_lora/health")["queue"]["running"] == 1, 30)
        waiting = clients.submit(ask, server.url, {**SLOW, "seed": 12})
        server.wait(lambda: server.get("/sdxl_lora/health")["queue"]["waiting"] == 1, 30)
        server.post("/queue", {"clear": True})
        assert sentence(waiting.result(30)) == (
            409,
            "the job was removed from ComfyUI's queue, or its result from the history",
        )
        server.post("/interrupt", {})
        assert sentence(running.result(30)) == (409, "the job was cancelled in ComfyUI")


def test_a_page_of_another_site_gets_nothing(server: Any) -> None:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
    headers = {"Content-Type": "application/json", "Origin": "http://evil.example"}
    connection.request("POST", "/sdxl_lora/generate", json.dumps(GOOD), headers)
    assert connection.getresponse().status == 403
    time.sleep(0.2)
    assert server.get("/sdxl_lora/health")["queue"]["waiting"] == 0
