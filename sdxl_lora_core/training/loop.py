"""The training loop: steps, looks, checkpoints, from the cached data to what was learned."""

from __future__ import annotations

import errno
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..dataset.caption_dataset import CaptionDataset
from ..lora.modules import LoRAFile
from ..runtime.determinism import deterministic_steps
from ..runtime.device import release_memory
from ..runtime.distributed import Processes
from ..sdxl.base import SDXLBase
from ..sdxl.precision import resolve_dtype
from .config.train_config import TrainConfig
from .data.batches import TrainingData
from .evaluator import Evaluator, Sample
from .model.trainable import Learner
from .monitor.journal import Journal
from .monitor.progress import Meter, OnStep, StepReport
from .monitor.validation import best_look, converged
from .optim.accumulation import Gradients, size_of
from .optim.lr_schedule import learning_rate
from .optim.memory_plan import set_checkpointing
from .optim.optimizers import make_optimizer, set_learning_rates, state_copies
from .optim.weight_average import Averaging
from .run.checkpoints import Checkpoint, Checkpoints
from .run.loop_state import LoopState, Trained

log = logging.getLogger("sdxl_lora")

GIVE_UP_AFTER = 5


class Diverged(RuntimeError):
    """Training went where there are no numbers."""


WriteAdapter = Callable[[Path, LoRAFile, int], None]


def train_adapter(
    base: SDXLBase,
    dataset: CaptionDataset,
    config: TrainConfig,
    *,
    cache: Path,
    checkpoints: Checkpoints,
    start: Checkpoint | None,
    write_adapter: WriteAdapter,
    sample: Sample,
    journal: Journal,
    device: torch.device,
    on_step: OnStep,
    should_stop: Callable[[], bool],
    processes: Processes,
) -> Trained:
    """Caches, then trains until `config.steps` or `should_stop`, from the newest of `checkpoints`, else from `start`.

    `write_adapter` writes a LoRA file of what was learned after a number of steps, `sample` draws with it while the
    device is free. `on_step` may raise to cancel:
    a checkpoint is written first and the exception passes through. Raises ValueError for an image that changed,
    Diverged when losses are not finite, torch.OutOfMemoryError when nothing more can be saved, OSError when a cache
    or checkpoint cannot be written.
    """
    dtype = resolve_dtype(config.precision, device)
    data = TrainingData(base, dataset, config, cache, device, dtype)
    with processes.one_after_the_other():
        data.cache(lambda phase, done, total: on_step(StepReport(phase, done, total)))
    loop = Loop(base, config, data, device, dtype, checkpoints, write_adapter, sample, journal, processes)
    with loop, deterministic_steps(config.deterministic):
        return loop.run(start, on_step, should_stop)


class Loop:
    """What learns, the optimizer and where they stand. Closing it frees their memory."""

    def __init__(
        self,
        base: SDXLBase,
        config: TrainConfig,
        data: TrainingData,
        device: torch.device,
        dtype: torch.dtype,
        checkpoints: Checkpoints,
        write_adapter: WriteAdapter,
        sample: Sample,
        journal: Journal,
        processes: Processes,
    ) -> None:
        self.config, self.data, self.device, self.dtype = config, data, device, dtype
        self.checkpoints, self.write_adapter, self.journal = checkpoints, write_adapter, journal
        self.processes = processes
        self.learner = Learner(base, config, device, dtype)
        self.parameters = self.learner.learning
        self.optimizer = make_optimizer(self.learner.groups, config)
        self.averaging = Averaging(self.parameters, self.optimizer, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.gradients = Gradients(self.learner, data, config, self.scaler, processes)
        self.state = LoopState()
        self.saved_step = 0
        self.counted = time.monotonic()  # until when state.seconds has been counted
        self.evaluator = Evaluator(self.learner, self.averaging, data, config, processes, sample, journal, self.state)

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *_: object) -> None:
        del self.learner, self.gradients, self.optimizer, self.averaging, self.evaluator, self.parameters
        release_memory(self.device)

    @property
    def weights(self) -> list[Tensor]:
        """What a checkpoint keeps: the parameters that learn, their moving average and the best so far, if any."""
        return [*self.parameters, *self.averaging.ema, *self.evaluator.best]

    def run(self, start: Checkpoint | None, on_step: OnStep, should_stop: Callable[[], bool]) -> Trained:
        weights = len(self.weights) // len(self.parameters)
        adapter = 2 if self.config.init == "pissa" else 1  # its file holds the start beside what was learned
        require_space(self.checkpoints.folder, self.parameters, weights + state_copies(self.config) + adapter)
        if checkpoint := self.checkpoints.newest() or start:
            self.restore(checkpoint)
        else:
            self.gradients.plan(self.state)
        set_checkpointing(self.learner.unet, self.state.gradient_checkpointing)
        self.evaluator.look(on_step)  # at the base, or what a cancel left undone
        self.journal.open(self.state)
        meter, stopped = Meter(self.state.losses, self.device), False
        while not self.is_over and not stopped:
            with meter.update(sum(map(len, self.data.micro_batches(self.state.step)))):
                self.update()
            self.check_recent_steps()
            with self.saved_on_failure():
                self.follow(meter, on_step)
            stopped = self.processes.any(should_stop())
        self.save()
        self.check_result()
        return self.finish(on_step, stopped)

    @property
    def is_over(self) -> bool:
        return self.state.step >= self.config.steps or converged(self.config, self.state.looks)

    def restore(self, checkpoint: Checkpoint) -> None:
        checkpoint.restore(self.weights, self.optimizer)
        self.state = self.evaluator.state = checkpoint.state
        self.state.resumed += 1
        self.scaler.load_state_dict(checkpoint.scaler)
        log.info("the training goes on from step %d", self.state.step)
        if checkpoint.path.parent == self.checkpoints.folder:
            self.saved_step = self.state.step

    def follow(self, meter: Meter, on_step: OnStep) -> None:
        """Looks at the update just taken, writes it down, saves and reports it."""
        state = self.state
        report = meter.report(state.step, self.config.steps, state.losses[-1], state.learning_rates[-1])
        look = self.evaluator.look(on_step)
        self.journal.write(report, look)
        saves = state.step % self.config.checkpoint_every == 0
        if saves:
            self.save()
        if look or saves:
            self.journal.draw(state, best_look(self.config, state.looks))
        on_step(report)

    def finish(self, on_step: OnStep, stopped: bool) -> Trained:
        """The last look comes after the last checkpoint: a run that goes on from there has not seen it."""
        if self.evaluator.look(on_step, last=True):
            self.journal.open(self.state)
        kept = best_look(self.config, self.state.looks)
        self.journal.draw(self.state, kept, now=True)
        self.count_seconds()
        if kept is None:
            return Trained(self.evaluator.learned(), self.state, None, stopped and not self.is_over)
        self.evaluator.restore_best()
        return Trained(self.learner.learned(), self.state, kept, stopped and not self.is_over)

    @contextmanager
    def saved_on_failure(self) -> Iterator[None]:
        """Around what may fail or be cancelled between two updates: no step that was taken is lost."""
        try:
            yield
        except BaseException:
            self.save()
            raise

    def save(self) -> None:
        """Writes a checkpoint unless this step has one. A disk that fills up costs the checkpoint, not the run."""
        if self.saved_step == self.state.step or not self.processes.is_first:
            return
        if not all(parameter.isfinite().all() for parameter in self.parameters):
            log.warning("no checkpoint at step %d: the LoRA holds values that are not finite", self.state.step)
            return
        self.count_seconds()
        self.state.checkpoints.append(self.state.step)
        try:
            self.checkpoints.save(
                self.state,
                self.weights,
                self.optimizer,
                self.scaler.state_dict(),
                lambda path: self.write_adapter(path, self.evaluator.learned(), self.state.step),
            )
            self.saved_step = self.state.step
        except OSError as error:
            self.state.checkpoints.pop()
            log.warning("no checkpoint at step %d: %s", self.state.step, error)

    def count_seconds(self) -> None:
        now = time.monotonic()
        self.state.seconds += now - self.counted
        self.counted = now

    def update(self) -> None:
        """One optimizer update; not taken where the loss or the gradient is not finite."""
        step = self.state.step
        rate = learning_rate(self.config, step, self.state.schedule_start)
        set_learning_rates(self.optimizer, self.learner.groups, rate)
        with self.saved_on_failure():
            loss = self.gradients.of_update(self.state)
        self.scaler.unscale_(self.optimizer)
        limit = self.config.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        if math.isfinite(loss) and bool(norm.isfinite()):
            self.optimizer.step()
            self.averaging.update(step + 1)
        else:
            self.state.skipped.append(step + 1)
            log.warning("step %d is not taken: loss %s, gradient norm %s", step + 1, loss, norm.item())
        self.scaler.update()
        self.gradients.clear()
        self.state.step = step + 1
        self.state.losses.append(loss)
        self.state.learning_rates.append(rate)

    def check_recent_steps(self) -> None:
        """Gives up after some steps in a row that could not be taken, and goes back to the state before them.

        A second try would fail again, since all that is random depends on the step. fp16's loss scale is found by steps
        that fail, so it has to be at its lowest first.
        """
        failed = trailing_steps(self.state.skipped, self.state.step)
        if failed < GIVE_UP_AFTER or self.scaler.get_scale() > 1:
            return
        first = self.state.step - failed + 1
        self.state.rewind(failed)
        self.save()
        self.checkpoints.forget_after(self.state.step)
        kept = self.checkpoints.newest()
        where = f"the LoRA of {kept.path.name} is kept in {kept.path}" if kept else "there is no LoRA to keep"
        raise Diverged(
            f"loss or gradient was not finite in {failed} steps in a row, from step {first} on, and {where}: "
            "use precision bf16 or fp32, or a lower learning_rate"
        )

    def check_result(self) -> None:
        if not any(math.isfinite(loss) for loss in self.state.losses):
            raise Diverged(
                f"the loss was not finite in any of {self.state.step} steps, so there is no LoRA to save: "
                "use precision bf16 or fp32, or a lower learning_rate"
            )


def trailing_steps(steps: Sequence[int], last: int) -> int:
    """How many of the ascending `steps` are the run ... last-2, last-1, last."""
    count = 0
    while count < len(steps) and steps[-1 - count] == last - count:
        count += 1
    return count


def require_space(folder: Path, parameters: Sequence[Tensor], copies: int) -> None:
    """Raises OSError while nothing is lost yet: three checkpoints with so many `copies` of them each, and the LoRA."""
    folder.mkdir(parents=True, exist_ok=True)
    needed = (3 * copies + 1) * size_of(parameters)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"the run needs about {needed / 1e6:.0f} MB for its checkpoints and {free / 1e6:.0f} MB are free: "
            "make room or lower the rank; training has not started",
        )
