"""The length of a run: epochs as steps, and the starting point of a longer run."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

from .config.train_config import TrainConfig
from .data.class_images import with_planned_class_images
from .job import TrainingJob
from .optim.lr_schedule import learning_rate
from .run.checkpoints import Checkpoint
from .run.runs import Run

log = logging.getLogger("sdxl_lora")


def with_steps(job: TrainingJob) -> TrainingJob:
    """The job with `steps` in place of `epochs`: enough updates to see every image that often, repeats included."""
    config = job.config
    if config.epochs == 0:
        return job
    steps = math.ceil(config.epochs * batches_per_epoch(job) / config.gradient_accumulation)
    warmup = config.lr_warmup_steps
    if warmup >= steps:
        requested, warmup = warmup, steps // 10
        log.warning("lr_warmup_steps is %d and the epochs are %d steps: warming up over %d", requested, steps, warmup)
    return replace(job, config=replace(config, steps=steps, epochs=0, lr_warmup_steps=warmup))


def batches_per_epoch(job: TrainingJob) -> int:
    """The number of batches that see every image as often as its repeats say, class images included."""
    return len(with_planned_class_images(job).epoch_batches(0))


def starting_point(related: Sequence[Run], config: TrainConfig) -> Checkpoint | None:
    """The latest checkpoint of related runs from which this run can continue; None to start at the base.

    If its steps had the learning rates that this run would have used, as with a constant one, the result equals that of
    one long run, byte for byte. Otherwise the schedule, warm-up included, restarts at the next step, and only a run
    that was not planned to be longer than this one is used.
    """
    starts = []
    for run in related:
        try:
            checkpoint = run.checkpoints.newest()
        except ValueError as error:
            log.warning("%s cannot be continued: %s", run.name, error)
            continue
        if checkpoint is None or checkpoint.state.step > config.steps:
            continue
        state = checkpoint.state
        agrees = state.learning_rates == [learning_rate(config, step) for step in range(state.step)]
        if not agrees and run.identity["steps"] > config.steps:
            continue
        state.schedule_start = 0 if agrees else state.step
        state.continued_from = run.name
        starts.append(checkpoint)
    return max(starts, key=lambda start: start.state.step, default=None)
