"""Two processes on the CPU against one: the same update, every image seen once, one set of files."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing.context import BaseContext, ForkServerProcess
from pathlib import Path

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
from tests.training.ranks import start_ranks

ROOT = Path(__file__).resolve().parents[2]
# Validation, because its loss is shared out, too; three images an update, because two processes cannot halve them.
CONFIG = replace(
    SMALL,
    steps=6,
    batch_size=1,
    gradient_accumulation=3,
    checkpoint_every=2,
    validate_every=3,
    text_encoder_learning_rate=1e-3,
    new_tokens="picture",
    tensorboard="off",
)


def write_run(folder: Path, base: SDXLBase, pictures: Path, config: TrainConfig) -> None:
    sections = {
        "base": {"path": str(base.path), "precision": base.precision},
        "datasets": [{"folder": str(pictures), "resolution": 64, "validation_percent": 20}],
        "train": config,
    }
    to_yaml(folder / "run.yaml", sections)


def arguments(folder: Path, cache: Path) -> list[str]:
    return ["train", str(folder / "run.yaml"), "--output", str(folder), "--home", str(cache), "--device", "cpu"]


def launch(folder: Path, cache: Path) -> None:
    """As a user does it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "sdxl_lora_core"]
    done = subprocess.run(
        [*command, *arguments(folder, cache)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def wait_for(file: Path, ranks: list[ForkServerProcess]) -> None:
    """Until the processes have written it."""
    while not file.exists():
        assert all(rank.is_alive() for rank in ranks)
        time.sleep(0.02)


def end(ranks: list[ForkServerProcess]) -> None:
    """What launchers do when one of the processes has died."""
    for rank in ranks:
        rank.terminate()
        rank.join(30)
        rank.kill()


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "lora_runs/small/metrics.csv").read_text().splitlines()))


@pytest.mark.slow
def test_two_processes_train_as_one_and_resume_when_one_is_killed(
    trained: Trained, forks: BaseContext, micro_base: SDXLBase, pictures: Path, cache: Path, tmp_path: Path
) -> None:
    alone = trained(CONFIG, validation_percent=20)
    expected = list(csv.DictReader((alone.loss_chart.parent / "metrics.csv").read_text().splitlines()))

    two = tmp_path / "two"
    two.mkdir()
    write_run(two, micro_base, pictures, CONFIG)
    launch(two, cache)
    for ours, theirs in zip(rows(two), expected, strict=True):
        for column in ("step", "loss", "validation_loss"):  # no loss before the first step, no look at most of them
            assert float(ours[column] or 0) == pytest.approx(float(theirs[column] or 0), rel=1e-5)
    assert [path.name for path in (two / "loras").iterdir()] == ["small.safetensors"]
    trained, reference = load_file(two / "loras/small.safetensors"), load_file(alone.lora_path)
    assert all((trained[name] - reference[name]).abs().max() < 1e-4 for name in reference)

    killed = tmp_path / "killed"
    killed.mkdir()
    write_run(killed, micro_base, pictures, CONFIG)
    first, second = ranks = start_ranks(forks, arguments(killed, cache), tmp_path / "output")
    wait_for(killed / "lora_runs/small/checkpoints/step-000002", ranks)
    second.kill()
    end(ranks)
    if first.exitcode == 0:
        pytest.skip("the run was over before the kill")
    for rank in (again := start_ranks(forks, arguments(killed, cache), tmp_path / "output")):
        rank.join()
    assert [rank.exitcode for rank in again] == [0, 0], (tmp_path / "output.0").read_text()
    assert (killed / "loras/small.safetensors").read_bytes() == (two / "loras/small.safetensors").read_bytes()


@pytest.mark.slow
def test_all_processes_leave_when_the_first_is_stopped_while_it_draws(
    forks: BaseContext, micro_base: SDXLBase, pictures: Path, cache: Path, tmp_path: Path
) -> None:
    config = replace(CONFIG, validate_every=0, sample_prompts=("one", "two"), sample_every=2, sample_steps=200)
    write_run(tmp_path, micro_base, pictures, config)
    ranks = start_ranks(forks, arguments(tmp_path, cache), tmp_path / "output")
    wait_for(tmp_path / "lora_runs/small/samples/.step-000002.safetensors", ranks)
    ranks[0].terminate()
    for rank in ranks:
        rank.join()
    assert "stopped at a checkpoint before the end" in (tmp_path / "output.0").read_text()
    assert "the first process of this run failed or was stopped" in (tmp_path / "output.1").read_text()
    assert (tmp_path / "lora_runs/small/checkpoints/step-000002").exists()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_image_goes_to_one_process_with_its_position(count: int) -> None:
    batches = [[10, 11, 12], [13], [14, 15, 16, 17]]
    seen: dict[int, int] = {}
    for rank in range(count):
        for _, indices, first, _ in passes(0, batches, 2, Processes(rank, count)):
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
