"""kill -9 at random moments of a run, which then goes on to the same bytes: 3 times, 17 more in `make accept`."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import replace
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest

from tests.training.killed_runs import STEPS, Job, train_until_killed

SEEDS = [*range(3), *(pytest.param(seed, marks=pytest.mark.accept) for seed in range(3, 20))]
ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="Windows has neither fork nor SIGKILL"),
]


@pytest.fixture(scope="module")
def uninterrupted(
    forks: BaseContext, micro_sdxl: Path, pictures: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Job, int, float]:
    """The job of a run that was never killed, its calls on files, and the seconds of a step."""
    job = Job(micro_sdxl, pictures, cache, tmp_path_factory.mktemp("whole"))
    train_to_the_end(forks, job)  # fills the caches, so that the next one is like all others
    job = replace(job, folder=tmp_path_factory.mktemp("again"))
    started = time.monotonic()
    calls = train_to_the_end(forks, job)
    return job, calls, (time.monotonic() - started) / STEPS


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_run_ends_with_the_same_bytes(
    forks: BaseContext, uninterrupted: tuple[Job, int, float], tmp_path: Path, seed: int
) -> None:
    """Killed twice: in a call on a file, which is nearly always inside a save, and at any other moment."""
    whole, calls, step_time = uninterrupted
    draw = random.Random(seed)
    job = replace(whole, folder=tmp_path)
    kill_in_a_file_call(forks, job, draw.randrange(1, calls * 2 // 3))
    kill_at_a_moment(forks, job, draw.randrange(1, STEPS), draw.uniform(0, step_time))
    train_to_the_end(forks, job)
    assert job.lora.read_bytes() == whole.lora.read_bytes()
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob(".tmp-*"))


def kill_in_a_file_call(forks: BaseContext, job: Job, call: int) -> None:
    _, child = start(forks, replace(job, fatal_call=call))
    child.join()
    assert child.exitcode == -signal.SIGKILL


def kill_at_a_moment(forks: BaseContext, job: Job, step: int, delay: float) -> None:
    """`delay` seconds after the step, or after the first step that is left to do."""
    events, child = start(forks, job)
    while events.recv()[1] < step:
        pass
    time.sleep(delay)
    child.kill()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)


def train_to_the_end(forks: BaseContext, job: Job) -> int:
    events, child = start(forks, job)
    while (event := events.recv())[0] != "calls":
        pass
    child.join()
    assert child.exitcode == 0
    return event[1]


def start(forks: BaseContext, job: Job):  # noqa: ANN201 - the context's own types
    ours, theirs = forks.Pipe(duplex=False)
    child = forks.Process(target=train_until_killed, args=(job, theirs))
    child.start()
    theirs.close()  # ours then ends when the child does
    return ours, child
