"""The files in deploy/: read by the programs they are for, and in agreement with the pack."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from benchmarks.four_servers import free_port, with_ports
from tools.run_workflow import ROOT

DEPLOY = ROOT / "deploy"


def read(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")


NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="no nginx")


@needs_nginx
def test_nginx_takes_its_configuration(tmp_path: Path) -> None:
    for name, text in {"own": read("nginx.conf"), "ports": with_ports(read("nginx.conf"), 8081, [1234, 1235])}.items():
        (tmp_path / f"{name}.conf").write_text(text, encoding="utf-8")
        command = [str(NGINX), "-t", "-p", str(tmp_path), "-c", str(tmp_path / f"{name}.conf")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


class Stub(BaseHTTPRequestHandler):
    """Answers as a server of ComfyUI does, with a full queue while its server's port is in `full`."""

    full: ClassVar[set[int]] = set()
    hosts: ClassVar[set[str]] = set()

    def do_POST(self) -> None:
        port = self.connection.getsockname()[1]
        self.rfile.read(int(self.headers["Content-Length"]))
        self.hosts.add(self.headers["Host"])
        body = b'{"error": "full"}' if port in self.full else str(port).encode()
        self.send_response(503 if port in self.full else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def posted(url: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url, b"{}", timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.fixture
def balanced(tmp_path: Path) -> Iterator[tuple[str, list[int]]]:
    """The address of nginx in front of three stubs, and their ports."""
    stubs = [ThreadingHTTPServer(("127.0.0.1", 0), Stub) for _ in range(3)]
    for stub in stubs:
        threading.Thread(target=stub.serve_forever, daemon=True).start()
    ports, port = [stub.server_address[1] for stub in stubs], free_port()
    conf = tmp_path / "nginx.conf"
    conf.write_text(with_ports(read("nginx.conf"), port, ports), encoding="utf-8")
    command = [str(NGINX), "-p", str(tmp_path), "-c", str(conf), "-e", "error.log", "-g", "daemon off;"]
    nginx = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_for_port(port)
        yield f"http://127.0.0.1:{port}/sdxl_lora", ports
    finally:
        nginx.terminate()
        nginx.wait(20)
        for stub in stubs:
            stub.shutdown()
            stub.server_close()


def wait_for_port(port: int) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise TimeoutError(f"nothing listens on port {port}")


@needs_nginx
def test_a_full_server_is_passed_over_and_asked_again(
    balanced: tuple[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (url, ports), one = balanced, balanced[1][0]
    monkeypatch.setattr(Stub, "full", set(ports))
    assert [posted(f"{url}/generate") for _ in range(6)] == [(503, b'{"error": "full"}')] * 6
    monkeypatch.setattr(Stub, "full", {one})
    answers = {posted(f"{url}/generate") for _ in range(12)}
    assert answers == {(200, str(port).encode()) for port in ports if port != one}
    monkeypatch.setattr(Stub, "full", set())
    assert (200, str(one).encode()) in {posted(f"{url}/generate") for _ in range(12)}
    assert posted(f"{url}/stop")[0] == 404, "other routes are private"
    assert {url} == {f"http://{host}/sdxl_lora" for host in Stub.hosts}


def test_the_balancer_sends_a_failed_request_to_another_server() -> None:
    conf = read("nginx.conf")
    tries = re.search(r"proxy_next_upstream (.*);", conf)
    assert tries and {"error", "timeout", "http_503", "non_idempotent"} <= set(tries[1].split())
    other = with_ports(conf, 8081, [1234, 1235])
    assert "max_fails=0" in conf, "a server with a full queue is asked again"
    assert re.findall(r"server 127\.0\.0\.1:(\d+) ", other) == ["1234", "1235"] and "listen 127.0.0.1:8081" in other


def test_kubernetes_runs_what_the_container_has() -> None:
    claim, settings, deployment, service = yaml.safe_load_all(read("kubernetes.yaml"))
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert deployment["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"] == service["spec"]["selector"]
    port = container["ports"][0]["containerPort"]
    assert port == service["spec"]["ports"][0]["targetPort"] == container["readinessProbe"]["httpGet"]["port"] == 8188
    assert f"EXPOSE {port}" in read("Containerfile")
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounted) == {volume["name"] for volume in pod["spec"]["volumes"]}
    paths: Any = yaml.safe_load(read("extra_model_paths.yaml"))
    assert paths["shared"]["base_path"] == mounted["shared"] and "sdxl_lora_cache" in paths["shared"]
    assert container["args"][-1].startswith(mounted["settings"])
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert volumes["settings"]["configMap"]["name"] == settings["metadata"]["name"]
    assert yaml.safe_load(settings["data"][Path(container["args"][-1]).name]) == paths


def test_the_container_copies_and_starts_what_is_there() -> None:
    text = read("Containerfile")
    for source in re.findall(r"^COPY (\S+) ", text, re.MULTILINE):
        assert (ROOT / source).exists()
    health = re.search(r"urlopen\('http://127\.0\.0\.1:8188(/[\w/]+)'\)", text)
    assert health and health[1] in (ROOT / "nodes/host/service.py").read_text(encoding="utf-8")
    commands = re.findall(r"^#     (docker .*)$", text, re.MULTILINE)
    assert len(commands) == 2
    for page in ("docs/scale.md", "README.md"):
        assert all(command in (ROOT / page).read_text(encoding="utf-8") for command in commands)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_job_for_slurm_is_a_script_that_trains() -> None:
    done = subprocess.run(["bash", "-n", str(DEPLOY / "train.slurm")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = read("train.slurm")
    assert "-m sdxl_lora_core train" in text and "#SBATCH --requeue" in text
    gpus = re.search(r"--gpus-per-node=(\d+)", text)
    assert gpus and f"SLURM_NNODES * {gpus[1]}" in text
