"""The report of a run, and its settings file."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..dataset.config import DatasetConfig
from ..files import write_text_atomic
from ..sdxl.base import prediction_arguments
from ..settings import fields_of, to_yaml, without_effect
from .config.captions import placeholder_ids, tokens_of
from .config.train_config import TrainConfig, learning_encoders
from .data.batches import small_batches
from .data.caption_variants import truncated_captions
from .job import TrainingJob
from .monitor.charts import smoothed
from .run.loop_state import LoopState, Trained
from .run.runs import Run
from .run_length import batches_per_epoch


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """The contents of report.json: what was trained, and how the run went.

    Fields with the default None concern some runs only; JSON leaves them out where they are None. `reused` and
    `clip_scores` describe this call and are not in the file.
    """

    lora: str
    base: str
    images: int
    steps: int
    epochs: float
    loss: float | None  # None if it is not finite
    modules: int
    adapter: str
    rank: int | list[int]
    trigger_words: list[str]
    memory: str
    skipped_steps: list[int]
    skipped_files: list[str]
    regularisation_images: int | None = None
    cut_captions: list[str] | None = None
    text_encoders: str | None = None
    new_tokens: dict[str, str] | None = None
    small_batches: str | None = None
    note: str | None = None
    without_effect: list[str] | None = None
    stopped: str | None = None
    early_stopping: str | None = None
    continued: str | None = None
    validation_loss: float | None = None
    validation_loss_before: float | None = None
    kept: str | None = None
    check_captions: list[str] | None = None
    reused: bool | None = None
    clip_scores: Sequence[float | None] | None = field(default=None)

    @classmethod
    def read(cls, file: Path) -> RunReport:
        values = json.loads(file.read_text(encoding="utf-8"))
        return cls(**{name: value for name, value in values.items() if name in fields_of(cls)})

    def write(self, file: Path) -> None:
        write_text_atomic(file, self.to_json())

    def to_json(self) -> str:
        always = {"loss"} if self.validation_loss_before is None else {"loss", "validation_loss"}
        values = {name: value for name, value in vars(self).items() if value is not None or name in always}
        return json.dumps(values, indent=2)


def describe_run(report: RunReport, path: Path) -> str:
    """The report in some lines for people: what was trained and where it is, then what is out of the ordinary."""
    loss = "" if report.loss is None else f", loss {report.loss:.4f}"
    validation = ""
    if report.validation_loss is not None and report.validation_loss_before is not None:
        validation = f", validation loss {report.validation_loss_before:.4f} -> {report.validation_loss:.4f}"
    found = "found again" if report.reused else f"{report.steps} steps on {report.images} images"
    lines = [f"Saved as {path}: {found}{loss}{validation}."]
    if known := [score for score in report.clip_scores or () if score is not None]:
        lines.append(f"mean CLIP score of the samples: {sum(known) / len(known):.1f}")
    if report.trigger_words:
        lines.append(f"trigger words: {', '.join(report.trigger_words)}")
    notes = (report.stopped, report.early_stopping, report.continued, report.kept, report.note, report.small_batches)
    lines += [note for note in notes if note]
    lines += report.check_captions or ()
    lines += [f"left out: {file}" for file in report.skipped_files]
    if report.skipped_steps:
        lines.append(f"{len(report.skipped_steps)} steps were skipped, because their loss was not finite")
    return "\n".join([*lines, f"memory: {report.memory}"] if report.memory else lines)


def make_report(run: Run, job: TrainingJob, trained: Trained) -> RunReport:
    """The report of a run from the result of its training loop."""
    state, dataset = trained.state, job.dataset
    return RunReport(
        lora=run.lora_path.name,
        base=job.base.name,
        images=len(dataset.entries),
        steps=state.step,
        epochs=round(state.step * job.config.gradient_accumulation / batches_per_epoch(job), 2),
        loss=_finite(smoothed(state.losses)[-1]),
        modules=sum(map(len, trained.learned.parts().values())),
        adapter=job.config.adapter,
        rank=_ranks(trained),
        trigger_words=job.trigger_words,
        memory=state.memory,
        skipped_steps=state.skipped,
        skipped_files=[f"{problem.file}: {problem.reason}" for problem in dataset.problems if problem.skipped],
        **_notes(run, job),
        **_course(job.config, trained),
    )


def _notes(run: Run, job: TrainingJob) -> dict[str, Any]:
    """Fields that concern some runs only and are known before training."""
    config, notes = job.config, {}
    if job.dataset.regularisation:
        notes["regularisation_images"] = len(job.dataset.regularisation)
    if cut := truncated_captions(job.base, job.dataset.entries, config.caption_chunks, placeholder_ids(config)):
        notes["cut_captions"] = [f"{name}: truncated: {words}" for name, words in cut]
    if encoders := learning_encoders(config):
        notes["text_encoders"] = f"{' and '.join(encoders)} read the captions in every step, without the cache"
    if tokens := tokens_of(config):
        notes["new_tokens"] = {
            token: f"embedding:{run.embedding(token).stem} in prompts of ComfyUI's own nodes" for token in tokens
        }
    if note := small_batches(job):
        notes["small_batches"] = note
    if run.name != config.lora_name:
        notes["note"] = f"the name {config.lora_name} was taken, so this LoRA is {run.name}"
    if unused := without_effect(config):
        notes["without_effect"] = [*unused.values()]
    return notes


def _course(config: TrainConfig, trained: Trained) -> dict[str, Any]:
    """Fields that say how the run began and ended, if not from the base and after its last step."""
    state = trained.state
    course: dict[str, Any] = {}
    if trained.stopped_early:
        course["stopped"] = (
            f"stopped on request after {state.step} of {config.steps} steps, and kept: with another number of steps, "
            f"such as {config.steps + 1}, training continues from here into a new file"
        )
    elif state.step < config.steps:
        course["early_stopping"] = (
            f"stopped early after {state.step} of {config.steps} steps: {config.early_stopping} validations in a row "
            "without a lower loss"
        )
    if state.continued_from:
        course["continued"] = _continued(state, config)
    if validated := [past for past in state.looks if past.validation_loss is not None]:
        course["validation_loss"] = (trained.kept or validated[-1]).validation_loss
        course["validation_loss_before"] = validated[0].validation_loss
    if trained.kept:
        course["kept"] = f"the file has the adapter of step {trained.kept.step}, the best by {config.keep_best}"
    return course


def _continued(state: LoopState, config: TrainConfig) -> str:
    if not state.schedule_start:
        return f"the first steps are those of {state.continued_from}, as in one run of {config.steps} steps"
    return (
        f"the first {state.schedule_start} steps are those of {state.continued_from}; after them the schedule "
        f"{config.lr_schedule} starts again, warm-up included"
    )


def _ranks(trained: Trained) -> int | list[int]:
    """The ranks in the saved file: PiSSA doubles the setting, and blocks may have their own."""
    ranks = sorted({module.rank for part in trained.learned.parts().values() for module in part.values()})
    return ranks[0] if len(ranks) == 1 else ranks


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def save_settings(run: Run, job: TrainingJob, facts: dict[str, Any]) -> None:
    """Writes run.yaml, with which the command line repeats the run: all settings, and the paths of base and images."""
    base = job.base
    to_yaml(
        run.folder / "run.yaml",
        {
            "base": {
                "path": str(base.path),
                "precision": base.precision,
                **prediction_arguments(base),
                **({"vae": str(base.vae)} if base.vae else {}),
            },
            "datasets": _sections(job.dataset.sources),
            "validation": _sections(job.dataset.validation_sources),
            "train": job.config,
            "run": facts,
        },
    )


def _sections(sources: Sequence[tuple[Path, DatasetConfig]]) -> list[dict[str, Any]]:
    return [{"folder": str(folder), **dataclasses.asdict(settings)} for folder, settings in sources]
