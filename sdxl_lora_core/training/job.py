"""The values that `train` takes: the job and its context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from ..dataset.buckets import epoch_batches
from ..dataset.caption_dataset import CaptionDataset, CaptionEntry
from ..runtime.device import DeviceMemory
from ..runtime.distributed import Processes
from ..runtime.loaded_parts import LoadedParts
from ..sdxl.base import SDXLBase
from ..sdxl.precision import resolve_dtype
from .config.captions import tokens_of
from .config.train_config import TrainConfig
from .monitor.progress import OnStep
from .run.runs import RANDOMNESS_VERSION, RunFolders, run_fingerprint


@dataclass(frozen=True)
class TrainingJob:
    """A base, the images to train on, and the settings of the run."""

    base: SDXLBase
    dataset: CaptionDataset
    config: TrainConfig

    @cached_property
    def fingerprint(self) -> str:
        """Identifies every step of the run (see run_fingerprint)."""
        return run_fingerprint(self.base, self.dataset, self.config)

    @cached_property
    def earlier_fingerprints(self) -> list[str]:
        """Those of the same run with former versions, whose finished runs are still found."""
        versions = range(1, RANDOMNESS_VERSION)
        return [run_fingerprint(self.base, self.dataset, self.config, version) for version in versions]

    @cached_property
    def entries(self) -> tuple[CaptionEntry, ...]:
        """The training images, followed by the regularisation images."""
        return (*self.dataset.entries, *self.dataset.regularisation)

    @property
    def trigger_words(self) -> list[str]:
        """The words that activate the LoRA in a prompt: the dataset's trigger words and the new tokens."""
        return list(dict.fromkeys([*self.dataset.trigger_words, *tokens_of(self.config)]))

    @property
    def resolution(self) -> int:
        """The largest resolution of the training images, in pixels."""
        return max(entry.resolution for entry in self.dataset.entries)

    def epoch_batches(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch as indices into `entries`. An update takes `gradient_accumulation` of them."""
        buckets, repeats = [entry.bucket for entry in self.entries], [entry.repeats for entry in self.entries]
        return epoch_batches(buckets, repeats, self.config.batch_size, self.config.seed, epoch)

    def dtype(self, device: torch.device) -> torch.dtype:
        """The precision of the frozen weights on this device."""
        return resolve_dtype(self.config.precision, device)


@dataclass(frozen=True)
class RunContext:
    """The resources of a run: its folders, the device, and callbacks.

    `on_step` gets a StepReport and may raise to cancel; a checkpoint is written first. `should_stop` ends the run after
    the current step and keeps the LoRA. `on_run` gets the name of the run before its first step. `parts` owns the
    weights that generate images; by default the run has its own. `memory` is what may be used of the device's.
    """

    folders: RunFolders
    device: torch.device
    on_step: OnStep = lambda report: None
    should_stop: Callable[[], bool] = lambda: False
    on_run: Callable[[str], None] = lambda name: None
    parts: LoadedParts | None = None
    memory: DeviceMemory | None = None

    @cached_property
    def processes(self) -> Processes:
        """The processes that share this run, as launched by accelerate."""
        return Processes.launched(self.device)

    @property
    def device_memory(self) -> DeviceMemory:
        return self.memory or DeviceMemory(self.device)

    @cached_property
    def owner(self) -> LoadedParts:
        return self.parts or LoadedParts(self.device, offload=True)
