"""Several ComfyUI servers behind nginx with one cache: throughput, share of hits, and a server that is killed.

    python -m benchmarks.four_servers --comfyui ~/ComfyUI --servers 1 2 4

Each round sends the same requests, of which most are repeated, from eight clients; in the last one a server is killed
half-way. Prints a table, and fails if a request was not answered or an image was made twice. Needs nginx.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CLIENTS, IMAGES, TIMES = 8, 60, 4
THREADS = {"OMP_NUM_THREADS": "1"}  # more threads than cores would wait for each other
REQUEST = {"base": "tiny-sdxl (bundled)", "prompt": "a red circle", "steps": 8, "width": 128, "height": 128}


class Answer(NamedTuple):
    """Of one request: its seed, the status (0 for none), whether the image came from the cache, and the seconds."""

    seed: int
    status: int
    hit: bool
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    print("| servers | killed | requests | not answered | images made | made twice | hits | images/s | median s |")
    print("|---|---|---|---|---|---|---|---|---|")
    rounds = [*((count, False) for count in options.servers), (max(options.servers), True)]
    for count, kills in rounds:
        print_row(count, kills, *one_round(options.comfyui.expanduser(), count, kills))


def print_row(count: int, kills: bool, answers: list[Answer], seconds: float) -> None:
    failed = [answer for answer in answers if answer.status != 200]
    made = Counter(answer.seed for answer in answers if answer.status == 200 and not answer.hit)
    twice = sum(number > 1 for number in made.values())
    hits = sum(answer.hit for answer in answers) / len(answers)
    median = sorted(answer.seconds for answer in answers)[len(answers) // 2]
    cells = [count, "one" if kills else "none", len(answers), len(failed), len(made), twice, f"{hits:.0%}"]
    print("|", " | ".join(map(str, [*cells, f"{len(answers) / seconds:.1f}", f"{median:.2f}"])), "|", flush=True)
    assert not failed and not twice, (failed[:3], made.most_common(3))


def one_round(comfyui: Path, count: int, kills: bool) -> tuple[list[Answer], float]:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        home = Path(folder)
        ports = [free_port() for _ in range(count)]
        servers = [stack.enter_context(server(comfyui, home, port)) for port in ports]
        url = stack.enter_context(balancer(home, ports))
        for port in ports:
            wait_for(f"http://127.0.0.1:{port}/sdxl_lora/health")
        seeds = [number % IMAGES for number in range(IMAGES * TIMES)]
        start = time.monotonic()
        with ThreadPoolExecutor(CLIENTS) as clients:
            waiting = [clients.submit(ask, url, seed) for seed in seeds]
            if kills:
                while sum(one.done() for one in waiting) < IMAGES // 2:
                    time.sleep(0.05)
                os.kill(servers[0].pid, signal.SIGKILL)
            return [one.result() for one in waiting], time.monotonic() - start


def ask(url: str, seed: int) -> Answer:
    body = json.dumps({**REQUEST, "seed": seed}).encode()
    request = urllib.request.Request(f"{url}/sdxl_lora/generate", body, {"Content-Type": "application/json"})
    start = time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            answer.read()
            return Answer(seed, answer.status, answer.headers["X-From-Cache"] == "true", time.monotonic() - start)
    except urllib.error.HTTPError as error:
        return Answer(seed, error.code, False, time.monotonic() - start)
    except OSError:
        return Answer(seed, 0, False, time.monotonic() - start)


@contextmanager
def server(comfyui: Path, home: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A server in a folder of its own, with the cache in a folder of all."""
    base = home / str(port)
    for name in ("custom_nodes", "input", "user", "models"):
        (base / name).mkdir(parents=True)
    (base / "custom_nodes/sdxl-lora-nodes").symlink_to(ROOT)
    paths = home / "extra_model_paths.yaml"
    paths.write_text(f"shared:\n  base_path: {home}\n  sdxl_lora_cache: shared_cache\n", encoding="utf-8")
    python = next(
        (path for path in (comfyui / ".venv/bin/python", comfyui / "venv/bin/python") if path.exists()), "python"
    )
    command = [str(python), "main.py", "--cpu", "--port", str(port), "--base-directory", str(base)]
    command += ["--disable-api-nodes", "--extra-model-paths-config", str(paths)]
    command += ["--database-url", f"sqlite:///{base}/user/comfyui.db"]
    with open(base / "log", "wb") as log:
        process = subprocess.Popen(command, cwd=comfyui, stdout=log, stderr=log, env={**os.environ, **THREADS})
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def balancer(home: Path, ports: list[int]) -> Iterator[str]:
    """nginx by deploy/nginx.conf, on free ports."""
    nginx = shutil.which("nginx") or "/usr/sbin/nginx"
    port = free_port()
    file = home / "nginx.conf"
    file.write_text(with_ports((ROOT / "deploy/nginx.conf").read_text(encoding="utf-8"), port, ports), encoding="utf-8")
    process = subprocess.Popen([nginx, "-p", str(home), "-c", str(file), "-g", "daemon off;"])
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def with_ports(conf: str, port: int, servers: list[int]) -> str:
    """deploy/nginx.conf with other ports."""
    (line, *others) = re.findall(r"^ *server 127\.0\.0\.1:\d+ .*\n", conf, re.MULTILINE)
    own = "".join(re.sub(r":\d+", f":{number}", line, count=1) for number in servers)
    for other in others:
        conf = conf.replace(other, "")
    return conf.replace(line, own).replace("listen 127.0.0.1:8080", f"listen 127.0.0.1:{port}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url: str, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            assert time.monotonic() < end, f"{url} does not answer"
            time.sleep(0.2)


if __name__ == "__main__":
    main()
