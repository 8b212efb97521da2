"""Where a training run stands, and what it has measured so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...lora.modules import LoRAFile
from ..config.memory import Checkpointing


@dataclass(frozen=True)
class Look:
    """What was seen after `step` updates: the held-out loss, and each sample's CLIP score (None: unknown)."""

    step: int
    validation_loss: float | None = None
    clip_scores: Sequence[float | None] = ()

    @property
    def clip_score(self) -> float | None:
        """The mean, 0 to 100, if every sample has a score."""
        known = [score for score in self.clip_scores if score is not None]
        return sum(known) / len(known) if known and len(known) == len(self.clip_scores) else None


@dataclass
class LoopState:
    """What a run needs to go on as if it had never stopped. Randomness depends on the step only, so it is not in it."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    images_per_pass: int = 0  # at most the batch; fewer where memory is short
    gradient_checkpointing: Checkpointing = "off"
    memory: str = ""  # why these two
    schedule_start: int = 0  # the step from which the learning rate's schedule counts
    continued_from: str | None = None  # the run that took the first steps
    seconds: float = 0.0  # of training, samples and validation included, over all sessions
    resumed: int = 0  # how often the run went on from a checkpoint

    def rewind(self, steps: int) -> None:
        """Forgets the last `steps`, none of which was taken."""
        self.step -= steps
        del self.losses[self.step :], self.learning_rates[self.step :]
        self.skipped = [step for step in self.skipped if step <= self.step]
        self.looks = [look for look in self.looks if look.step <= self.step]
        self.checkpoints = [step for step in self.checkpoints if step <= self.step]

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LoopState:
        return cls(**{**values, "looks": [Look(**look) for look in values["looks"]]})


@dataclass(frozen=True)
class Trained:
    """A finished loop: what was learned, as a file without metadata, and how it went.

    `kept` is the look that `keep_best` chose the adapter for; None: it is that of the last step. `stopped_early` says
    that `should_stop` ended the run.
    """

    learned: LoRAFile
    state: LoopState
    kept: Look | None
    stopped_early: bool

    @property
    def step(self) -> int:
        """The number of updates that made the adapter."""
        return self.kept.step if self.kept else self.state.step
