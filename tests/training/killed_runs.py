"""A training run in a process of its own, so that it can be killed."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import diffusers.models.unets.unet_2d_condition  # noqa: F401 - this and the next: imported once, before the fork
import peft  # noqa: F401
import torch

from sdxl_lora_core.cache.folders import CacheFolders
from sdxl_lora_core.sdxl.base import open_base
from sdxl_lora_core.training.run.runs import RunFolders
from tests.micro.runs import SMALL, load, train_on

STEPS = 6
CONFIG = replace(SMALL, steps=STEPS, checkpoint_every=2, gradient_accumulation=2, dropout=0.2, caption_dropout=0.3)
_FILE_CALLS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"}


@dataclass(frozen=True)
class Job:
    """What is trained where. `fatal_call` is the number of the call on a file of the run in which the process dies."""

    base: Path
    pictures: Path
    cache: Path
    folder: Path
    fatal_call: int = 0

    @property
    def lora(self) -> Path:
        return self.folder / "loras" / "small.safetensors"


def train_until_killed(job: Job, events: Connection) -> None:
    """Sends the number of each step when it is done, and at the end how many calls on the run's files there were."""
    torch.set_num_threads(1)
    calls = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal calls
        if event in _FILE_CALLS and str(arguments[0]).startswith(str(job.folder)):
            calls += 1
            if calls == job.fatal_call:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    folders = RunFolders(job.folder / "loras", job.folder / "runs", CacheFolders(job.cache), lambda name: False)
    base = open_base(job.base, precision="fp32")
    train_on(
        base, load(job.pictures), CONFIG, folders=folders, on_step=lambda report: events.send(("step", report.done))
    )
    events.send(("calls", calls))
