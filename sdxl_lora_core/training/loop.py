"""The training loop: from cached data to a trained adapter, by steps, evaluations and checkpoints."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from ..lora.modules import LoRAFile
from ..runtime.determinism import deterministic_steps
from ..runtime.device import release_memory
from .data.batches import TrainingData
from .data.feed import Feed
from .evaluator import Evaluator
from .job import RunContext, TrainingJob
from .model.checkpointing import set_checkpointing
from .model.trainable import TrainableSDXL
from .monitor.journal import Journal
from .monitor.progress import Meter, OnStep, StepReport
from .monitor.sample_images import Samples
from .monitor.validation import best_evaluation, converged, samples_due, validation_due
from .optim.accumulation import Gradients
from .optim.optimizers import state_copies, state_on_cpu
from .optim.run_plan import planned_state
from .optim.updates import Updates
from .outputs import RunOutputs
from .run.checkpoints import Checkpoint, require_space
from .run.loop_state import ImageLosses, Trained

log = logging.getLogger("sdxl_lora")

GIVE_UP_AFTER = 5


class Diverged(RuntimeError):
    """Losses or gradients were not finite for too long."""


def train_adapter(
    job: TrainingJob, context: RunContext, outputs: RunOutputs, journal: Journal, start: Checkpoint | None
) -> Trained:
    """Caches the data, then trains until `config.steps` or `should_stop`.

    Training resumes from the run's newest checkpoint, otherwise from `start`. An exception of `on_step` passes through
    after a checkpoint. Raises ValueError for an image that changed, Diverged if losses are not finite,
    torch.OutOfMemoryError if memory cannot be reduced further, OSError if a cache or checkpoint cannot be written.
    """
    data = TrainingData(job, context.folders.cache, context.device)
    with context.processes.one_after_the_other():
        data.cache(lambda phase, done, total: context.on_step(StepReport(phase, done, total)))
    with Loop(data, context, outputs, journal, start) as loop, deterministic_steps(job.config.deterministic):
        return loop.run()


class Loop:
    """Steps and saves. It owns the model, the optimizer and the state of the run; leaving it frees their memory."""

    def __init__(
        self,
        data: TrainingData,
        context: RunContext,
        outputs: RunOutputs,
        journal: Journal,
        start: Checkpoint | None = None,
    ) -> None:
        self.config, self.data, self.device = data.config, data, context.device
        self.checkpoints, self.outputs, self.journal = outputs.run.checkpoints, outputs, journal
        self.processes, self.on_step, self.should_stop = context.processes, context.on_step, context.should_stop
        self.start = self.checkpoints.newest() or start
        self.state = self.start.state if self.start else planned_state(data, context.device_memory)
        stored = self.state.base_weights, self.state.offloaded_blocks
        self.model = TrainableSDXL(data.job, self.device, *stored)
        self.flat = self.model.flat
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=data.dtype == torch.float16)
        self.updates = Updates(self.flat, self.config, self.scaler)
        self.feed = Feed(data, self.device)
        self.gradients = Gradients(self.model, self.feed, self.config, self.scaler, self.processes)
        self.saved_step = self.reported = 0
        self.counted = time.monotonic()  # the time up to which state.seconds is counted
        averaging = self.updates.averaging
        self.evaluator = Evaluator(self.model, averaging, data, context.processes, self._sample, journal, self.state)

    def _sample(self, learned: LoRAFile, step: int, on_step: OnStep) -> Samples:
        """Samples while the optimizer's state and the averages are in main memory, so that the device is free."""
        with state_on_cpu(self.updates.optimizer), self.updates.averaging.on_cpu():
            return self.outputs.sample_images(learned, step, on_step)

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *_: object) -> None:
        """Drops the references here, because the traceback of an exception keeps this object alive."""
        self.feed.close()
        del self.model, self.gradients, self.updates, self.evaluator, self.flat, self.feed, self.data
        release_memory(self.device)

    @property
    def weights(self) -> list[Tensor]:
        """The tensors of a checkpoint: the trained parameters, their moving average and the best so far, if any."""
        return [self.flat.values, *self.updates.averaging.ema, *self.evaluator.best]

    def run(self) -> Trained:
        adapter = 2 if self.config.init == "pissa" else 1  # its file has the initial values as well
        copies = len(self.weights) + state_copies(self.config) + adapter
        require_space(self.checkpoints.folder, self.flat.values.nbytes, copies)
        if self.start:
            self.restore(self.start)
        elif self.late and self.updates.wait_for_loss:
            self.state.memory += f"; {self.config.optimizer} waits for the loss before each update"
        set_checkpointing(self.model.unet, self.state.gradient_checkpointing)
        self.evaluator.evaluate(self.on_step)  # of the base, or the evaluation that a cancel interrupted
        self.measure_images()
        if self.saved_step == self.state.step:
            self.save_lora()  # a cancel may have come between the step and this
        self.journal.open(self.state)
        meter, stopped = Meter(self.state.losses, self.device), False
        self.reported = self.state.step
        while not self.is_over and not stopped:
            with meter.update(sum(map(len, self.data.micro_batches(self.state.step)))):
                self.update()
                self.read_losses(0 if self.is_due else self.late)
            self.check_recent_steps()
            with self.saved_on_failure():
                self.follow(meter)
            stopped = self.processes.any(self.should_stop())
        with self.saved_on_failure():
            self.read_losses()
            self.follow(meter)
        self.save()
        self.check_result()
        return self.finish(stopped)

    @property
    def is_over(self) -> bool:
        return self.state.step >= self.config.steps or converged(self.config, self.state.looks)

    @property
    def is_due(self) -> bool:
        """Whether something is to be done with the model after this step, or after the last one."""
        step, config = self.state.step, self.config
        due = validation_due(config, step) or samples_due(config, step, last=False)
        saves = step % config.checkpoint_every == 0 or (config.save_every and step % config.save_every == 0)
        return bool(due or saves or step >= config.steps)

    @property
    def late(self) -> int:
        """How many updates the device may be behind: reading a loss at once would leave it idle until the next one."""
        return 0 if self.device.type == "cpu" else 1

    def restore(self, checkpoint: Checkpoint) -> None:
        checkpoint.restore(self.weights, self.updates.optimizer)
        self.flat.refresh()
        self.state.resumed += 1
        self.scaler.load_state_dict(checkpoint.scaler)
        log.info("training resumes at step %d", self.state.step)
        if checkpoint.path.parent == self.checkpoints.folder:
            self.saved_step = self.state.step

    def follow(self, meter: Meter) -> None:
        """Reports the updates whose losses were read. After the last of all, evaluates and saves first."""
        state = self.state
        while self.reported < len(state.losses):
            self.reported += 1
            loss, rate = state.losses[self.reported - 1], state.learning_rates[self.reported - 1]
            report = meter.report(self.reported, self.config.steps, loss, rate)
            if self.reported == state.step:
                report = self.evaluate_and_save(report)
            else:
                self.journal.write(report)
            self.on_step(report)

    def evaluate_and_save(self, report: StepReport) -> StepReport:
        """Returns the report with the validation loss, if there is one."""
        state = self.state
        if evaluation := self.evaluator.evaluate(self.on_step):
            report = replace(report, validation_loss=evaluation.validation_loss)
        self.journal.write(report)
        saves = state.step % self.config.checkpoint_every == 0
        if saves:
            self.save()
        self.save_lora()
        if evaluation or saves:
            self.journal.plot(state, best_evaluation(self.config, state.looks))
        return report

    def finish(self, stopped: bool) -> Trained:
        """The last evaluation follows the last checkpoint, so that a longer run resumes without it."""
        if self.evaluator.evaluate(self.on_step, last=True):
            self.journal.open(self.state)
        if self.state.image_losses:
            trained = self.evaluator.image_losses(True, self.on_step)
            self.state.image_losses = replace(self.state.image_losses, trained=trained)
        kept = best_evaluation(self.config, self.state.looks)
        self.journal.plot(self.state, kept, now=True)
        self.count_seconds()
        if kept is None:
            return Trained(self.evaluator.learned(), self.state, None, stopped and not self.is_over)
        self.evaluator.restore_best()
        return Trained(self.model.learned(), self.state, kept, stopped and not self.is_over)

    def measure_images(self) -> None:
        """Measures the loss of each image before the first step."""
        if self.state.step == 0 and self.data.measures_images:
            captioned, uncaptioned = (self.evaluator.image_losses(which, self.on_step) for which in (True, False))
            self.state.image_losses = ImageLosses(captioned, uncaptioned)

    @contextmanager
    def saved_on_failure(self) -> Iterator[None]:
        """Saves a checkpoint if the block fails or is cancelled, so that no step is lost."""
        try:
            yield
        except BaseException:
            self.save()
            raise

    def save(self) -> None:
        """Writes a checkpoint unless this step has one. A full disk costs the checkpoint, not the run."""
        self.read_losses()
        if self.saved_step == self.state.step or not self.processes.is_first:
            return
        if not self.flat.values.isfinite().all():
            log.warning("no checkpoint at step %d: the LoRA has values that are not finite", self.state.step)
            return
        self.count_seconds()
        self.state.checkpoints.append(self.state.step)
        try:
            self.checkpoints.save(
                self.state,
                self.weights,
                self.updates.optimizer,
                self.scaler.state_dict(),
                lambda path: self.outputs.write_checkpoint_adapter(path, self.evaluator.learned(), self.state.step),
            )
            self.saved_step = self.state.step
        except OSError as error:
            self.state.checkpoints.pop()
            log.warning("no checkpoint at step %d: %s", self.state.step, error)

    def save_lora(self) -> None:
        """Keeps the LoRA of this step if one is due before the last step. A full disk costs it, not the run."""
        step, every = self.state.step, self.config.save_every
        if not every or step % every or not 0 < step < self.config.steps or not self.processes.is_first:
            return
        try:
            self.outputs.write_step(self.evaluator.learned(), self.state.step)
        except OSError as error:
            log.warning("the LoRA of step %d is not kept: %s", self.state.step, error)

    def count_seconds(self) -> None:
        now = time.monotonic()
        self.state.seconds += now - self.counted
        self.counted = now

    def update(self) -> None:
        """One update of the parameters. Nothing here waits for the device, unless the optimizer has to."""
        with self.saved_on_failure():
            losses = self.gradients.of_update(self.state)
        self.updates.apply(losses, self.state)

    def read_losses(self, late: int = 0) -> None:
        """Reads the losses of all updates but the last `late`."""
        self.updates.read_losses(self.state, late)

    def check_recent_steps(self) -> None:
        """Gives up after some skipped steps in a row, and restores the state before them.

        Repeating them would fail again, because randomness depends on the step only. The loss scale of fp16 is found by
        failing steps, so it must be at its minimum first.
        """
        if self.state.failing < GIVE_UP_AFTER:
            return
        self.read_losses()
        failed = self.state.failing
        if failed < GIVE_UP_AFTER or self.scaler.get_scale() > 1:
            return
        first = self.state.step - failed + 1
        self.state.rewind(failed)
        self.save()
        self.checkpoints.remove_after(self.state.step)
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
