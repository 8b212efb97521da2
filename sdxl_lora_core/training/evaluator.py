"""Evaluates a run while it trains: validation loss, sample images, and the best adapter so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..lora.files import LoRAFile
from ..runtime.device import release_memory
from ..runtime.distributed import Processes
from .data.batches import IMAGE_TIMESTEPS, VALIDATION_TIMESTEPS, Batch, TrainingData
from .model.trainable import TrainableSDXL
from .monitor.journal import Journal
from .monitor.progress import OnStep, StepReport
from .monitor.sample_images import Samples
from .monitor.validation import best_evaluation, samples_due, validation_due
from .optim.weight_average import Averaging
from .run.loop_state import Evaluation, LoopState

Sample = Callable[[LoRAFile, int, OnStep], Samples]


@dataclass
class Evaluator:
    """Evaluates the model after the steps that the run's settings choose, and adds the results to `state`.

    `sample` generates images with a LoRA while the device is free. `best` is a copy on the CPU of the parameters that
    keep_best would save, if it is on.
    """

    model: TrainableSDXL
    averaging: Averaging
    data: TrainingData
    processes: Processes
    sample: Sample
    journal: Journal
    state: LoopState
    best: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.config, self.device = self.data.config, self.data.device
        self.best = [self.model.flat.values.to("cpu", copy=True)] if self.config.keep_best != "off" else []

    def evaluate(self, on_step: OnStep, last: bool = False) -> Evaluation | None:
        """Runs the evaluations that are due at this step, and keeps the best adapter so far. None if none is due."""
        state, config = self.state, self.config
        known = next((past for past in state.looks if past.step == state.step), Evaluation(state.step))
        validates = known.validation_loss is None and (last or validation_due(config, state.step))
        samples = not known.clip_scores and samples_due(config, state.step, last)
        found = known
        if validates and self.data.validation:
            found = replace(found, validation_loss=self.validation_loss(on_step))
        if samples:
            found = replace(found, clip_scores=self._sample(on_step))
        if found == known:
            return None
        state.looks = [*(past for past in state.looks if past.step != state.step), found]
        if best_evaluation(config, state.looks) is found:
            self._keep_best()
        return found

    def restore_best(self) -> None:
        """Restores the best parameters."""
        for best in self.best:
            self.model.flat.assign(best)

    def learned(self) -> LoRAFile:
        """The LoRA as it would be saved now."""
        with self.averaging.in_place():
            return self.model.learned()

    def validation_loss(self, on_step: OnStep) -> float:
        total = len(self.data.validation) * len(VALIDATION_TIMESTEPS)
        return self._errors(self.data.validation_batches(), total, "validating", on_step).mean().item()

    def image_losses(self, with_captions: bool, on_step: OnStep) -> list[float]:
        """The mean squared error of each training image at fixed timesteps."""
        total = self.data.first_regularisation * len(IMAGE_TIMESTEPS)
        errors = self._errors(self.data.image_batches(with_captions), total, "measuring each image", on_step)
        return errors.reshape(-1, len(IMAGE_TIMESTEPS)).mean(1).tolist()

    @torch.no_grad()
    def _errors(self, batches: Iterable[Batch], total: int, phase: str, on_step: OnStep) -> Tensor:
        """The mean squared error of each of `total` batches of one sample, float64 [total]."""
        self.model.eval()
        errors = torch.zeros(total, dtype=torch.float64)
        with self.averaging.in_place():
            for done, batch in enumerate(batches):
                on_step(StepReport(phase, done, total))
                if done % self.processes.count == self.processes.rank:
                    errors[done] = self.model.squared_errors(batch.to(self.device)).item()
        self.processes.add_up([errors])
        return errors

    def _sample(self, on_step: OnStep) -> tuple[float | None, ...]:
        """The CLIP scores of samples. The first process generates them, the others wait for the scores."""
        scores: tuple[float | None, ...] = ()
        with self.processes.one_after_the_other():
            if self.processes.is_first:
                scores = self._sample_here(on_step)
        return self.processes.share(scores)

    def _sample_here(self, on_step: OnStep) -> tuple[float | None, ...]:
        """Generates samples while the model is in main memory, so that the device is free."""
        learned = self.learned()
        self.model.move(torch.device("cpu"))
        release_memory(self.device)
        try:
            samples = self.sample(learned, self.state.step, on_step)
        finally:
            self.model.move(self.device)
        self.journal.show(samples.pixels, self.state.step)
        return samples.clip_scores

    def _keep_best(self) -> None:
        with self.averaging.in_place():
            for best in self.best:
                best.copy_(self.model.flat.values)
