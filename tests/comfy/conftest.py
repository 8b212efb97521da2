"""Real ComfyUIs with this pack in them: a server of each, on the CPU, in a folder of its own.

COMFYUI_PATH names the checkouts, separated as in PATH; each runs on the Python of its own environment. A checkout with
Nodes 2.0 is opened with the newest page, of the package comfyui-frontend-package in our environment.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.comfy.page import browser, open_page, ours

ROOT = Path(__file__).resolve().parents[2]
CODE = ("__init__.py", "pyproject.toml", "nodes", "sdxl_lora_core")
SHIPPED = (*CODE, "web", "locales", "example_workflows", "subgraphs", "assets")
SMALL = {
    "CompareLoRAs": {"steps": 1},
    "PickCheckpoint": {"steps": 1},
    "FindStrength": {"steps": 1},
    "WatchOptions": {"validate_every": 2, "sample_every": 2, "sample_steps": 2, "save_every": 1},
    "TrainSDXLLoRA": {"steps": 3, "rank": 2, "batch_size": 1},
    "SDXLGenerateCached": {"steps": 2, "count": 1},
}


def checkouts() -> list[Path]:
    named = os.environ.get("COMFYUI_PATH", os.pathsep.join(["~/ComfyUI", "~/ComfyUI-033"]))
    folders = [Path(name).expanduser() for name in named.split(os.pathsep) if name]
    return [folder for folder in folders if (folder / "main.py").exists()]


def version(comfyui: Path) -> str:
    (found,) = re.findall(r'__version__ = "(.+)"', (comfyui / "comfyui_version.py").read_text(encoding="utf-8"))
    return found


def has_nodes_2(comfyui: Path) -> bool:
    return tuple(map(int, version(comfyui).split("."))) >= (0, 10)


@pytest.fixture(scope="session", params=checkouts() or [None], ids=lambda folder: version(folder) if folder else "none")
def comfyui(request: pytest.FixtureRequest) -> Path:
    if request.param is None:
        reason = "no ComfyUI found: set COMFYUI_PATH"
        pytest.fail(reason) if os.environ.get("REQUIRE_COMFYUI") else pytest.skip(reason)
    return request.param


@pytest.fixture(scope="session")
def comfyui_python(comfyui: Path) -> str:
    return python_of(comfyui)


def python_of(comfyui: Path) -> str:
    """The Python that ComfyUI runs on: COMFYUI_PYTHON, or its own environment, or ours."""
    own = [comfyui / name / "bin/python" for name in ("venv", ".venv")]
    found = next((str(python) for python in own if python.exists()), sys.executable)
    return os.environ.get("COMFYUI_PYTHON", found)


class Server:
    """ComfyUI's HTTP interface, as far as the tests need it."""

    def __init__(self, base: Path, port: int, pid: int) -> None:
        self.base = base
        self.pid = pid
        self.url = f"http://127.0.0.1:{port}"
        self.log = base / "server.log"

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return json.load(response)

    def post(self, path: str, body: Any) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            text = response.read()
        return json.loads(text) if text else None

    def queue(self, workflow: dict[str, Any]) -> str:
        return self.post("/prompt", {"prompt": workflow})["prompt_id"]

    def refused(self, workflow: dict[str, Any]) -> str:
        """What ComfyUI says to a prompt that does not even start."""
        try:
            prompt = self.queue(workflow)
        except urllib.error.HTTPError as error:
            return error.read().decode()
        raise AssertionError(f"prompt {prompt} was accepted")

    def finished(self, prompt: str, seconds: float = 300) -> dict[str, Any]:
        """The history entry of a prompt, once it is over."""
        self.wait(lambda: self.get(f"/history/{prompt}"), seconds)
        return self.get(f"/history/{prompt}")[prompt]

    def run(self, workflow: dict[str, Any], seconds: float = 300) -> dict[str, Any]:
        """Node outputs (what the page shows) of a prompt that has to succeed."""
        entry = self.finished(self.queue(workflow), seconds)
        assert entry["status"]["status_str"] == "success", json.dumps(entry["status"], indent=1)
        return entry["outputs"]

    def failure(self, workflow: dict[str, Any]) -> str:
        """The message of a prompt that has to fail while it runs."""
        entry = self.finished(self.queue(workflow))
        errors = [data for name, data in entry["status"]["messages"] if name == "execution_error"]
        assert errors, entry["status"]
        return errors[0]["exception_message"]

    def wait(self, ready: Callable[[], Any], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < end, f"nothing after {seconds} s; log:\n{self.text()[-3000:]}"
            time.sleep(0.2)

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


@contextmanager
def started(
    comfyui: Path, python: str, base: Path, *options: str, device: tuple[str, ...] = ("--cpu",)
) -> Iterator[Server]:
    """A server of its own with its folders in `base`."""
    options += newest_page() if has_nodes_2(comfyui) else ()
    install_pack(base / "custom_nodes" / "sdxl-lora-nodes")
    for folder in ("input", "user", "models"):
        (base / folder).mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python, "main.py", *device, "--port", str(port), "--base-directory", str(base), *options]
    command += ["--disable-api-nodes", "--database-url", f"sqlite:///{base}/user/comfyui.db"]
    with open(base / "server.log", "wb") as log:
        process = subprocess.Popen(command, cwd=comfyui, stdout=log, stderr=subprocess.STDOUT)
    found = Server(base, port, process.pid)
    try:
        found.wait(lambda: process.poll() is not None or _answers(found), 180)
        assert process.poll() is None, f"ComfyUI did not start:\n{found.text()}"
        yield found
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="session")
def server(comfyui: Path, comfyui_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("comfy")
    with started(comfyui, comfyui_python, base, "--preview-method", "latent2rgb") as server:
        yield server


@pytest.fixture(scope="session")
def start_server(comfyui: Path, comfyui_python: str) -> Callable[..., AbstractContextManager[Server]]:
    """Starts one more server: gets its folder and options of ComfyUI's command line."""
    return functools.partial(started, comfyui, comfyui_python)


@pytest.fixture(scope="session")
def narrow_home(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base directory for ComfyUI with this pack, and what narrow.py writes into it. Removed in the end."""
    home = tmp_path_factory.mktemp("narrow")
    try:
        install_pack(home / "custom_nodes" / "sdxl-lora-nodes")
        subprocess.run([sys.executable, "-m", "tests.comfy.narrow", str(home)], cwd=ROOT, check=True)
        yield home
    finally:
        shutil.rmtree(home)


@pytest.fixture(scope="module", params=["classic", "nodes2"])
def nodes_2(request: pytest.FixtureRequest) -> bool:
    """Whether the page draws nodes by Nodes 2.0, or on the canvas."""
    return request.param == "nodes2"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out Nodes 2.0 where ComfyUI does not have it."""
    chosen = [(item, getattr(item, "callspec", None)) for item in items]
    impossible = [item for item, call in chosen if call and _needs_nodes_2(call.params)]
    config.hook.pytest_deselected(items=impossible)
    items[:] = [item for item in items if item not in impossible]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def page(server: Server, chromium: Any, nodes_2: bool) -> Iterator[Any]:
    """ComfyUI's page, one for the tests of a file. In the end, none of the pack's scripts has reported an error."""
    errors: list[str] = []
    page = open_page(chromium, server, errors, nodes_2)
    yield page
    page.close()
    assert not ours(errors)


def _needs_nodes_2(params: dict[str, Any]) -> bool:
    comfyui = params.get("comfyui")
    return params.get("nodes_2") == "nodes2" and comfyui is not None and not has_nodes_2(comfyui)


def newest_page() -> tuple[str, ...]:
    spec = importlib.util.find_spec("comfyui_frontend_package")
    assert spec and spec.origin, "pip install -r requirements-dev.txt"
    return "--front-end-root", str(Path(spec.origin).parent / "static")


def install_pack(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)


def _answers(server: Server) -> bool:
    try:
        return bool(server.get("/system_stats"))
    except OSError:
        return False


def small(workflow: dict[str, Any], **changes: dict[str, Any]) -> dict[str, Any]:
    """A shipped workflow with so few steps that a test can run it. `changes` go by node class."""

    def shrunk(kind: str, inputs: dict[str, Any]) -> dict[str, Any]:
        fewer = {name: value for name, value in SMALL.get(kind, {}).items() if name in inputs}
        return {**inputs, **fewer, **changes.get(kind, {})}

    return {key: {**node, "inputs": shrunk(node["class_type"], node["inputs"])} for key, node in workflow.items()}


@pytest.fixture(scope="session")
def shrink() -> Callable[..., dict[str, Any]]:
    return small


@pytest.fixture(scope="session")
def shipped() -> dict[str, dict[str, Any]]:
    """The API workflows by name."""
    files = sorted((ROOT / "example_workflows/api").glob("*.json"))
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
