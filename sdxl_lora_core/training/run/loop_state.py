"""The progress of a training run, and its measurements so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...lora.modules import LoRAFile
from ..config.memory import Checkpointing, WeightFormat


@dataclass(frozen=True)
class Evaluation:
    """The results after `step` updates: the validation loss, and each sample's CLIP score (None: unknown)."""

    step: int
    validation_loss: float | None = None
    clip_scores: Sequence[float | None] = ()

    @property
    def clip_score(self) -> float | None:
        """The mean, 0 to 100, if every sample has a score."""
        known = [score for score in self.clip_scores if score is not None]
        return sum(known) / len(known) if known and len(known) == len(self.clip_scores) else None


@dataclass(frozen=True)
class ImageLosses:
    """Mean squared errors of the training images in their order: with its caption and without one before training, and
    with its caption after it (empty until then)."""

    captioned: Sequence[float]
    uncaptioned: Sequence[float]
    trained: Sequence[float] = ()


@dataclass
class LoopState:
    """Everything needed to resume a run beside its tensors. Randomness depends on the step only.

    The names of the fields are those in state.json.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    looks: list[Evaluation] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    images_per_pass: int = 0  # at most the batch; fewer where memory is short
    gradient_checkpointing: Checkpointing = "off"
    base_weights: WeightFormat = "full"  # the format of the UNet's frozen weights
    offloaded_blocks: int = 0  # of the UNet, in main memory
    memory: str = ""  # the reason for these four
    schedule_start: int = 0  # the step at which the learning rate schedule starts
    continued_from: str | None = None  # the run that the first steps were taken from
    seconds: float = 0.0  # of training, samples and validation included, over all sessions
    resumed: int = 0  # how often the run was resumed from a checkpoint
    image_losses: ImageLosses | None = None

    @property
    def failing(self) -> int:
        """How many of the last steps in a row were skipped."""
        last, count = len(self.losses), 0
        while count < len(self.skipped) and self.skipped[-1 - count] == last - count:
            count += 1
        return count

    def rewind(self, steps: int) -> None:
        """Removes the last `steps`, none of which was applied."""
        self.step -= steps
        del self.losses[self.step :], self.learning_rates[self.step :]
        self.skipped = [step for step in self.skipped if step <= self.step]
        self.looks = [past for past in self.looks if past.step <= self.step]
        self.checkpoints = [step for step in self.checkpoints if step <= self.step]

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LoopState:
        losses = values.get("image_losses")
        images = ImageLosses(**losses) if losses else None
        return cls(**{**values, "looks": [Evaluation(**past) for past in values["looks"]], "image_losses": images})


@dataclass(frozen=True)
class Trained:
    """The result of the training loop. `learned` is the LoRA without metadata.

    `kept` is the evaluation whose adapter `keep_best` chose, None for that of the last step. `stopped_early` says that
    `should_stop` ended the run.
    """

    learned: LoRAFile
    state: LoopState
    kept: Evaluation | None
    stopped_early: bool

    @property
    def step(self) -> int:
        """The number of updates of the saved adapter."""
        return self.kept.step if self.kept else self.state.step
