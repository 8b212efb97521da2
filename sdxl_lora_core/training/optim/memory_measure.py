"""Counts the bytes of a training step on tensors without contents, before any weights are loaded.

It is exact for this UNet, adapter and image size. It takes seconds, so results are cached on disk.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...cache.tensor_cache import minor_version
from ...files import json_sha256, write_text_atomic
from ...sdxl.base import empty_part
from ...sdxl.detection import read_json
from ...sdxl.family import ENCODERS
from ...sdxl.precision import DTYPES
from ..config.adapter import AdapterSettings
from ..config.memory import Checkpointing, WeightFormat
from ..config.train_config import TrainConfig, learning_encoders
from ..data.batches import Batch
from ..job import TrainingJob
from ..model.base_weights import stored_bytes, weight_blocks
from ..model.checkpointing import set_checkpointing
from ..model.trainable import TrainableSDXL
from .memory_count import StorageCount, fake_tensors
from .optimizers import state_copies

_FORMATS: tuple[WeightFormat, ...] = ("full", "fp8", "int8")
_NO_SHAPES = ("block_learning_rates", "lora_plus_ratio", "continue_from", "save_format", "save_dtype", "init")


class MeasuredRun:
    """The bytes that a run takes on its device, for plan_memory.

    `batch_of` returns a batch of that many of the largest images, on the CPU. `folder` caches the counts: the same
    adapter takes the same for the same shapes, so it is counted once for all runs.
    """

    def __init__(self, job: TrainingJob, device: torch.device, batch_of: Callable[[int], Batch], folder: Path) -> None:
        self._job, self._batch_of = _countable(job, device), batch_of
        self._file = folder / f"{json_sha256(_dependencies(self._job, device, batch_of(1)))}.json"
        self._counts = _read(self._file)
        self._copies = 1 + state_copies(job.config) + bool(job.config.ema_decay)

    @property
    def blocks(self) -> int:
        """How many blocks of the UNet can be offloaded."""
        return len(self._resting["full"]) - 1

    def resting(self, weights: WeightFormat, offloaded: int) -> int:
        """Bytes between the passes. Of offloaded blocks that is the most that is there at once.

        The first copy of the trained parameters is counted with their gradients, the others are moments and averages.
        """
        return self._resting[weights][offloaded] + self._resting["trained"] + self._copies * self._resting["values"]

    def step(self, checkpointing: Checkpointing, images: int) -> int:
        """Bytes that a pass of `images` adds at its peak: every further image adds the same."""
        one = self._peak(checkpointing, 1)
        return one if images == 1 else one + (images - 1) * (self._peak(checkpointing, 2) - one)

    @property
    def _resting(self) -> dict[str, Any]:
        return self._known("resting", self._count_resting)

    def _peak(self, checkpointing: Checkpointing, images: int) -> int:
        return self._known(f"{checkpointing} {images}", lambda: self._count_step(checkpointing, images))

    def _known(self, name: str, count: Callable[[], Any]) -> Any:
        if name not in self._counts:
            self._counts[name] = count()
            with contextlib.suppress(OSError):  # on a full or read-only disk the next run counts again
                write_text_atomic(self._file, json.dumps(self._counts))
        return self._counts[name]

    def _count_resting(self) -> dict[str, Any]:
        """Frozen weights by format and number of offloaded blocks, and what is trained."""
        with fake_tensors():
            unet: Any = empty_part(self._job.base, "unet", DTYPES[self._job.config.precision])
            offloads = range(len(weight_blocks(unet)) + 1)
            frozen = {form: [sum(stored_bytes(unet, form, count)) for count in offloads] for form in _FORMATS}
        flat, encoders = self._model.flat, self._model.encoders
        text = sum(weight.nbytes for weight in encoders.parameters() if not weight.requires_grad) if encoders else 0
        trained = flat.gradients.nbytes + flat.low.nbytes + flat.pass_gradients.nbytes
        return {**frozen, "values": flat.values.nbytes, "trained": trained + text}

    def _count_step(self, checkpointing: Checkpointing, images: int) -> int:
        model, batch = self._model, self._batch_of(images)
        set_checkpointing(model.unet, checkpointing)
        with torch.random.fork_rng(devices=[]), self._mode, StorageCount() as count:
            model.losses(batch).sum().backward()
        return count.peak + sum(value.nbytes for value in vars(batch).values() if isinstance(value, Tensor))

    @cached_property
    def _mode(self) -> Any:
        return fake_tensors()

    @cached_property
    def _model(self) -> TrainableSDXL:
        with torch.random.fork_rng(devices=[]), self._mode:
            model = TrainableSDXL(self._job, torch.device("cpu"), load=_empty)
        # The dropout of LoHa and LoKr depends on random values, which cannot be read here.
        return model.train(self._job.config.adapter not in ("loha", "lokr"))


def _empty(base: Any, part: Any, dtype: torch.dtype, device: torch.device) -> Any:
    return empty_part(base, part, dtype)


def _countable(job: TrainingJob, device: torch.device) -> TrainingJob:
    """The job in the precision of `device`, without the contents of files: they do not change a shape."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    settings = {"precision": names[job.dtype(device)], "continue_from": "", "init": "kaiming"}
    return replace(job, config=replace(job.config, **settings))


def _dependencies(job: TrainingJob, device: torch.device, batch: Batch) -> dict[str, object]:
    """Everything that a count depends on. The code of this module is identified by the version of the folder."""
    config = job.config
    settings = {field.name for field in fields(AdapterSettings)} - {*_NO_SHAPES, *_RATES}
    encoders = learning_encoders(config)
    return {
        "adapter": {name: value for name, value in asdict(config).items() if name in settings},
        "parts": {part: read_json(job.base.configs / part / "config.json") for part in ("unet", *encoders)},
        "rates": [bool(getattr(config, rate)) for rate in _RATES],
        "shapes": shapes_of(batch, config),
        "precision": config.precision,
        "device": [device.type, *(torch.cuda.get_device_capability(device) if device.type == "cuda" else ())],
        "libraries": {name: minor_version(name) for name in ("torch", "diffusers", "peft", "transformers")},
    }


_RATES = tuple(f"{part}_learning_rate" for part in ENCODERS)


def shapes_of(batch: Batch, config: TrainConfig) -> Sequence[object]:
    """Everything that the tensor shapes of the forward pass depend on.

    Captions are part of it only if a text encoder is trained, which reads captions of any length; otherwise datasets
    share a count.
    """
    shapes: list[object] = [list(batch.latents.shape), None if batch.embeds is None else list(batch.embeds.shape)]
    shapes.append(batch.masks is not None)
    if learning_encoders(config):
        shapes += [batch.captions, config.caption_chunks, config.new_tokens, config.vectors_per_token]
    return shapes


def _read(file: Path) -> dict[str, Any]:
    """The cached counts; empty if there are none or the file is damaged."""
    try:
        known = json.loads(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) and all(map(_is_count, known.values())) else {}


def _is_count(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(part, list) or _is_count(part) for part in value.values())
    return type(value) is int and value >= 0
