"""Two processes on the CPU against one: the same update, every image seen once, one set of files."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from sdxl_lora_core.runtime.distributed import Processes
from sdxl_lora_core.sdxl.base import SDXLBase
from sdxl_lora_core.settings import to_yaml
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.optim.accumulation import passes
from sdxl_lora_core.training.train import require_work_for_all
from tests.micro.runs import SMALL, Trained

ROOT = Path(__file__).resolve().parents[2]
# Validation, because its loss is shared out, too; three images an update, because two processes cannot halve them.
CONFIG = replace(
    SMALL, steps=6, batch_size=1, gradient_accumulation=3, checkpoint_every=2, validate_every=3,
    text_encoder_learning_rate=1e-3, new_tokens="picture", tensorboard="off",
)  # fmt: skip


def write_run(folder: Path, base: SDXLBase, pictures: Path, config: TrainConfig) -> None:
    sections = {
        "base": {"path": str(base.path), "precision": base.precision},
        "datasets": [{"folder": str(pictures), "resolution": 64, "validation_percent": 20}],
        "train": config,
    }
    to_yaml(folder / "run.yaml", sections)


def launch(folder: Path, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "sdxl_lora_core"]
    command += ["train", str(folder / "run.yaml"), "--output", str(folder), "--home", str(cache)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--device", "cpu"], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(folder: Path, cache: Path) -> None:
    process = launch(folder, cache)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-3000:]


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    """Until `process` has written it."""
    while not file.exists():
        assert process.poll() is None
        time.sleep(0.02)


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "lora_runs/small/metrics.csv").read_text().splitlines()))


@pytest.mark.slow
def test_two_processes_train_as_one_and_resume_when_one_is_killed(
    trained: Trained, micro_base: SDXLBase, pictures: Path, cache: Path, tmp_path: Path
) -> None:
    alone = trained(CONFIG, validation_percent=20)
    expected = list(csv.DictReader((alone.loss_chart.parent / "metrics.csv").read_text().splitlines()))

    two = tmp_path / "two"
    two.mkdir()
    write_run(two, micro_base, pictures, CONFIG)
    finish(two, cache)
    for ours, theirs in zip(rows(two), expected, strict=True):
        for column in ("step", "loss", "validation_loss"):  # no loss before the first step, no look at most of them
            assert float(ours[column] or 0) == pytest.approx(float(theirs[column] or 0), rel=1e-5)
    assert [path.name for path in (two / "loras").iterdir()] == ["small.safetensors"]
    trained, reference = load_file(two / "loras/small.safetensors"), load_file(alone.lora_path)
    assert all((trained[name] - reference[name]).abs().max() < 1e-4 for name in reference)

    killed = tmp_path / "killed"
    killed.mkdir()
    write_run(killed, micro_base, pictures, CONFIG)
    process = launch(killed, cache)
    wait_for(killed / "lora_runs/small/checkpoints/step-000002", process)
    psutil.Process(process.pid).children()[1].kill()
    process.communicate()
    if process.returncode == 0:
        pytest.skip("the run was over before the kill")
    finish(killed, cache)
    assert (killed / "loras/small.safetensors").read_bytes() == (two / "loras/small.safetensors").read_bytes()


@pytest.mark.slow
def test_all_processes_leave_when_the_first_is_stopped_while_it_draws(
    micro_base: SDXLBase, pictures: Path, cache: Path, tmp_path: Path
) -> None:
    config = replace(CONFIG, validate_every=0, sample_prompts=("one", "two"), sample_every=2, sample_steps=200)
    write_run(tmp_path, micro_base, pictures, config)
    process = launch(tmp_path, cache)
    wait_for(tmp_path / "lora_runs/small/samples/.step-000002.safetensors", process)
    first, _ = sorted(psutil.Process(process.pid).children(), key=lambda child: child.environ()["RANK"])
    first.terminate()
    output, _ = process.communicate()
    assert "stopped before the end, at a checkpoint" in output
    assert "the first process of this run failed or was stopped" in output
    assert (tmp_path / "lora_runs/small/checkpoints/step-000002").exists()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_image_goes_to_one_process_with_its_position(count: int) -> None:
    batches = [[10, 11, 12], [13], [14, 15, 16, 17]]
    seen: dict[int, int] = {}
    for rank in range(count):
        for first, indices in passes(batches, 2, Processes(rank, count)):
            assert 1 <= len(indices) <= 2
            seen |= {first + number * count: index for number, index in enumerate(indices)}
    assert seen == {position: 10 + position for position in range(8)}


def test_a_process_without_work_is_refused() -> None:
    with pytest.raises(ValueError, match="an update has 1 images .* and there are 2 processes"):
        require_work_for_all(TrainConfig(), Processes(0, 2))


def test_one_process_alone_sends_nothing() -> None:
    tensor = torch.ones(2)
    Processes().add_up([tensor])
    assert tensor.tolist() == [1, 1] and Processes().share("a") == "a" and Processes().any(True)
