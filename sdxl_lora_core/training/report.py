"""What a finished run says of itself, as JSON values: what was trained and how it went."""

from __future__ import annotations

import math
from typing import Any

from ..dataset.caption_dataset import CaptionDataset
from ..sdxl.base import SDXLBase
from .config.captions import placeholder_ids, tokens_of
from .config.train_config import TrainConfig, learning_encoders
from .data.batches import all_trigger_words
from .data.caption_variants import cut_captions
from .monitor.charts import smoothed
from .run.loop_state import LoopState, Trained
from .run.runs import Run
from .run_length import passes_per_epoch


def make_report(
    run: Run, base: SDXLBase, dataset: CaptionDataset, config: TrainConfig, trained: Trained
) -> dict[str, Any]:
    """The contents of report.json. `trained` is what the training loop left."""
    state = trained.state
    report: dict[str, Any] = {
        "lora": run.lora_path.name,
        "base": base.name,
        "images": len(dataset.entries),
        "steps": state.step,
        "epochs": _epochs(dataset, config, state.step),
        "loss": _finite(smoothed(state.losses)[-1]),
        "modules": sum(map(len, trained.learned.parts().values())),
        "adapter": config.adapter,
        "rank": _ranks(trained),
        "trigger_words": all_trigger_words(dataset, config),
        "memory": state.memory,
        "skipped_steps": state.skipped,
        "skipped_files": [f"{problem.file}: {problem.reason}" for problem in dataset.problems if problem.skipped],
    }
    return report | _notes(run, base, dataset, config) | _course(config, trained)


def _notes(run: Run, base: SDXLBase, dataset: CaptionDataset, config: TrainConfig) -> dict[str, Any]:
    """What holds for some runs only, known before they begin."""
    notes: dict[str, Any] = {}
    if dataset.regularisation:
        notes["regularisation_images"] = len(dataset.regularisation)
    if cut := cut_captions(base, dataset.entries, config.caption_chunks, placeholder_ids(config)):
        notes["cut_captions"] = [f"{name}: not seen: {words}" for name, words in cut]
    if encoders := learning_encoders(config):
        notes["text_encoders"] = f"{' and '.join(encoders)} read the captions in every step, without the cache"
    if tokens := tokens_of(config):
        notes["new_tokens"] = {
            token: f"embedding:{run.embedding(token).stem} in prompts of ComfyUI's own nodes" for token in tokens
        }
    if run.name != config.lora_name:
        notes["note"] = f"{config.lora_name} was taken by another LoRA, so this one is {run.name}"
    return notes


def _course(config: TrainConfig, trained: Trained) -> dict[str, Any]:
    """How the run began and ended, where that is not from nothing after its last step."""
    state = trained.state
    course: dict[str, Any] = {}
    if trained.stopped_early:
        course["stopped"] = (
            f"stopped on request after {state.step} of {config.steps} steps, and kept: with another number of steps, "
            f"{config.steps + 1} for example, the training goes on from here in a file of its own"
        )
    elif state.step < config.steps:
        course["early_stopping"] = (
            f"stopped early after {state.step} of {config.steps} steps: {config.early_stopping} validations in a row "
            "brought no lower loss"
        )
    if state.continued_from:
        course["continued"] = _continued(state, config)
    if validated := [look for look in state.looks if look.validation_loss is not None]:
        course["validation_loss"] = (trained.kept or validated[-1]).validation_loss
        course["validation_loss_before"] = validated[0].validation_loss
    if trained.kept:
        course["kept"] = f"the file holds step {trained.kept.step}, the best by {config.keep_best}"
    return course


def _epochs(dataset: CaptionDataset, config: TrainConfig, steps: int) -> float:
    return round(steps * config.gradient_accumulation / passes_per_epoch(dataset, config), 2)


def _continued(state: LoopState, config: TrainConfig) -> str:
    if not state.schedule_start:
        return f"the first steps are those of {state.continued_from}, as in one run of {config.steps} steps"
    return (
        f"the first {state.schedule_start} steps are those of {state.continued_from}; after them the schedule "
        f"{config.lr_schedule} began anew, warm-up included"
    )


def _ranks(trained: Trained) -> int | list[int]:
    """Of the saved file: PiSSA's is twice the setting, and blocks may have their own."""
    ranks = sorted({module.rank for part in trained.learned.parts().values() for module in part.values()})
    return ranks[0] if len(ranks) == 1 else ranks


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
