"""Training runs of a few steps on the micro SDXL."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sdxl_lora_core.cache.folders import CacheFolders
from sdxl_lora_core.dataset.caption_dataset import CaptionDataset, load_caption_dataset, with_validation
from sdxl_lora_core.dataset.config import DatasetConfig
from sdxl_lora_core.sdxl.base import SDXLBase, scheduler_config
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.data.batches import Batch, TrainingData
from sdxl_lora_core.training.job import RunContext, TrainingJob
from sdxl_lora_core.training.model.objective import Objective
from sdxl_lora_core.training.model.trainable import TrainableSDXL
from sdxl_lora_core.training.monitor.progress import StepReport
from sdxl_lora_core.training.optim.accumulation import Gradients
from sdxl_lora_core.training.run.loop_state import LoopState
from sdxl_lora_core.training.run.runs import RunFolders
from sdxl_lora_core.training.train import TrainResult, train

CPU = torch.device("cpu")
SMALL = TrainConfig(
    lora_name="small",
    steps=4,
    learning_rate=1e-3,
    rank=2,
    alpha=4.0,
    batch_size=2,
    save_dtype="fp32",
    blocks="mid_block",  # a seventh of the layers: adding the adapter to all takes most of such a run
)
WHOLE = replace(SMALL, blocks="")  # with all of the UNet's layers


def load(pictures: Path, **settings: Any) -> CaptionDataset:
    return load_caption_dataset(pictures, DatasetConfig(resolution=64, **settings))


Train = Callable[..., TrainResult]  # conftest's `run`: a new run in the test's own folders
Trained = Callable[..., TrainResult]  # conftest's `trained`: a finished one that others read, too


class Cancelled(Exception):
    pass


def cancel_at(step: int) -> Callable[[StepReport], None]:
    def on_step(report: StepReport) -> None:
        if report.phase == "training" and report.done == step:
            raise Cancelled

    return on_step


Losses = Callable[[TrainableSDXL, Batch], torch.Tensor]


def change_losses(
    patch: pytest.MonkeyPatch, change: Callable[[Losses, TrainableSDXL, Batch, int], torch.Tensor]
) -> None:
    """The loss of a batch in 0-based `step` becomes change(losses, learner, batch, step)."""
    of_update, losses, steps = Gradients.of_update, TrainableSDXL.losses, [0]

    def noting(self: Gradients, state: LoopState) -> torch.Tensor:
        steps[0] = state.step
        return of_update(self, state)

    patch.setattr(Gradients, "of_update", noting)
    patch.setattr(TrainableSDXL, "losses", lambda self, batch: change(losses, self, batch, steps[0]))


def weights(result: TrainResult) -> bytes:
    """The file's tensors without its metadata, which names the settings."""
    tensors = load_file(result.lora_path)
    return b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))


def lora_bytes(result: TrainResult) -> bytes:
    return result.lora_path.read_bytes()


def objective(base: SDXLBase) -> Objective:
    from diffusers import DDPMScheduler

    return Objective(DDPMScheduler.from_config(scheduler_config(base)), SMALL)


def data_of(base: SDXLBase, dataset: CaptionDataset, cache: Path, **settings: Any) -> TrainingData:
    """What SMALL with these settings trains on, cached."""
    data = TrainingData(TrainingJob(base, dataset, replace(SMALL, **settings)), CacheFolders(cache), CPU)
    data.cache(lambda *_: None)
    return data


def train_on(
    base: SDXLBase,
    dataset: CaptionDataset,
    config: TrainConfig,
    *,
    folders: RunFolders,
    device: torch.device = CPU,
    validation: CaptionDataset | None = None,
    **context: Any,
) -> TrainResult:
    """train, with the fields of its context by name."""
    dataset = with_validation(dataset, validation) if validation else dataset
    return train(TrainingJob(base, dataset, config), RunContext(folders, device, **context))


def trainable(base: SDXLBase, config: TrainConfig) -> TrainableSDXL:
    """The model of a run with these settings; of the dataset it needs nothing."""
    nothing: Any = None
    return TrainableSDXL(TrainingJob(base, nothing, config), CPU)


def parameters_alive() -> set[int]:
    """The ids of all parameters that some object still holds."""
    gc.collect()
    return {id(thing) for thing in gc.get_objects() if isinstance(thing, nn.Parameter)}
