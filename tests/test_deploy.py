"""The files in deploy/: read by the programs they are for, and in agreement with the pack."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.four_servers import with_ports
from tools.run_workflow import ROOT

DEPLOY = ROOT / "deploy"


def read(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin") is None, reason="no nginx")
def test_nginx_takes_its_configuration(tmp_path: Path) -> None:
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin")
    for name, text in {"own": read("nginx.conf"), "ports": with_ports(read("nginx.conf"), 8081, [1234, 1235])}.items():
        (tmp_path / f"{name}.conf").write_text(text, encoding="utf-8")
        command = [str(nginx), "-t", "-p", str(tmp_path), "-c", str(tmp_path / f"{name}.conf")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


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
