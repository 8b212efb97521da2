"""How long a run is: epochs as steps, and more steps for a run that ended."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

from ..dataset.buckets import epoch_batches
from ..dataset.caption_dataset import CaptionDataset
from .config.train_config import TrainConfig
from .data.class_images import planned_class_images
from .optim.lr_schedule import learning_rate
from .run.checkpoints import Checkpoint
from .run.runs import Run

log = logging.getLogger("sdxl_lora")


def with_steps(config: TrainConfig, dataset: CaptionDataset) -> TrainConfig:
    """The settings with `steps` in place of `epochs`: enough updates to see every image that often, repeats counted."""
    if config.epochs == 0:
        return config
    steps = math.ceil(config.epochs * passes_per_epoch(dataset, config) / config.gradient_accumulation)
    warmup = config.lr_warmup_steps
    if warmup >= steps:
        asked, warmup = warmup, steps // 10
        log.warning("lr_warmup_steps is %d and the epochs are %d steps: warming up over %d", asked, steps, warmup)
    return replace(config, steps=steps, epochs=0, lr_warmup_steps=warmup)


def passes_per_epoch(dataset: CaptionDataset, config: TrainConfig) -> int:
    """Passes that see every image as often as its repeats say. An update takes `gradient_accumulation` of them."""
    entries = [*dataset.entries, *dataset.regularisation, *planned_class_images(dataset, config)]
    buckets, repeats = [entry.bucket for entry in entries], [entry.repeats for entry in entries]
    return len(epoch_batches(buckets, repeats, config.batch_size, config.seed, epoch=0))


def starting_point(related: Sequence[Run], config: TrainConfig) -> Checkpoint | None:
    """The latest checkpoint of the related runs from which this run can go on; None to begin at the base.

    Where the steps taken there had the learning rates that this run gives them, as with a constant one, the result is
    that of a single long run, byte for byte. Otherwise the schedule, warm-up included, begins anew with the next step,
    and only a run that was planned to be no longer than this one is a start.
    """
    starts = []
    for run in related:
        try:
            checkpoint = run.checkpoints.newest()
        except ValueError as error:
            log.warning("%s is no start: %s", run.name, error)
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
