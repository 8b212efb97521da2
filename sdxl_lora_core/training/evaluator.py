"""What is measured and kept of a run while it trains: the validation loss, sample images, the best adapter so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..lora.files import LoRAFile
from ..runtime.device import release_memory
from ..runtime.distributed import Processes
from .config.train_config import TrainConfig
from .data.batches import VALIDATION_TIMESTEPS, TrainingData
from .model.trainable import Learner
from .monitor.journal import Journal
from .monitor.progress import OnStep, StepReport
from .monitor.sample_images import Samples
from .monitor.validation import best_look, samples_due, validation_due
from .optim.weight_average import Averaging
from .run.loop_state import Look, LoopState

Sample = Callable[[LoRAFile, int, OnStep], Samples]


@dataclass
class Evaluator:
    """Evaluates the learner after the steps that `config` names, and notes the results in `state`.

    `sample` draws with a LoRA while the device is free. `best` are copies on the CPU of the parameters that keep_best
    would keep.
    """

    learner: Learner
    averaging: Averaging
    data: TrainingData
    config: TrainConfig
    processes: Processes
    sample: Sample
    journal: Journal
    state: LoopState
    best: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        kept = self.learner.learning if self.config.keep_best != "off" else ()
        self.best = [parameter.detach().to("cpu", copy=True) for parameter in kept]

    def look(self, on_step: OnStep, last: bool = False) -> Look | None:
        """Sees what is due after this step and was not seen before, and keeps the best adapter so far."""
        state, config = self.state, self.config
        seen = next((look for look in state.looks if look.step == state.step), Look(state.step))
        validates = seen.validation_loss is None and (last or validation_due(config, state.step))
        draws = not seen.clip_scores and samples_due(config, state.step, last)
        look = seen
        if validates and self.data.validation:
            look = replace(look, validation_loss=self.validation_loss(on_step))
        if draws:
            look = replace(look, clip_scores=self._draw_samples(on_step))
        if look == seen:
            return None
        state.looks = [*(past for past in state.looks if past.step != state.step), look]
        if best_look(config, state.looks) is look:
            self._keep_best()
        return look

    def restore_best(self) -> None:
        """Gives the learner the best parameters."""
        for parameter, best in zip(self.learner.learning, self.best, strict=True):
            parameter.data.copy_(best)

    def learned(self) -> LoRAFile:
        """What was learned, as it would be saved now."""
        with self.averaging.in_place():
            return self.learner.learned()

    @torch.no_grad()
    def validation_loss(self, on_step: OnStep) -> float:
        self.learner.eval()
        total = len(self.data.validation) * len(VALIDATION_TIMESTEPS)
        losses = torch.zeros(total, dtype=torch.float64)
        with self.averaging.in_place():
            for done, batch in enumerate(self.data.validation_batches()):
                on_step(StepReport("validating", done, total))
                if done % self.processes.count == self.processes.rank:
                    losses[done] = self.learner.squared_errors(batch).item()
        self.processes.add_up([losses])
        return losses.mean().item()

    def _draw_samples(self, on_step: OnStep) -> tuple[float | None, ...]:
        """The first process draws, the others wait for the scores, which decide what is kept."""
        scores: tuple[float | None, ...] = ()
        with self.processes.one_after_the_other():
            if self.processes.is_first:
                scores = self._draw_samples_here(on_step)
        return self.processes.share(scores)

    def _draw_samples_here(self, on_step: OnStep) -> tuple[float | None, ...]:
        """Meanwhile the model waits in main memory, so that the device is free; it comes back to the bit."""
        learned = self.learned()
        self.learner.to("cpu")
        release_memory(self.data.device)
        try:
            samples = self.sample(learned, self.state.step, on_step)
        finally:
            self.learner.to(self.data.device)
        self.journal.show(samples.pixels, self.state.step)
        return samples.clip_scores

    def _keep_best(self) -> None:
        with self.averaging.in_place():
            for best, parameter in zip(self.best, self.learner.learning, strict=True):
                best.copy_(parameter.detach())
