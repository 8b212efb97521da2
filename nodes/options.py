"""Further settings of a training run, a node for each group of them, on a link that chains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ..sdxl_lora_core.settings import fields_of
from ..sdxl_lora_core.train_config import TrainConfig
from .wires import CATEGORY, lines, train_widget


class TrainOptions:
    """The settings of one group. Only those that were changed travel on, so that a preset can fill the others."""

    GROUP: ClassVar[str]
    CATEGORY = f"{CATEGORY}/options"
    RETURN_TYPES = ("TRAIN_OPTIONS",)
    RETURN_NAMES = ("options",)
    OUTPUT_TOOLTIPS = ("The changed settings, for Train SDXL LoRA or a further options node.",)
    FUNCTION = "collect"

    @classmethod
    def settings(cls) -> list[str]:
        return [name for name, field in fields_of(TrainConfig).items() if field.metadata.get("group") == cls.GROUP]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        chain = (
            "TRAIN_OPTIONS",
            {"tooltip": "Settings from another options node. Where both set one, this one wins."},
        )
        return {"required": {}, "optional": {"options": chain, **{name: train_widget(name) for name in cls.settings()}}}

    def collect(self, options: Mapping[str, Any] | None = None, **settings: Any) -> tuple[dict[str, Any]]:
        fields = fields_of(TrainConfig)
        values = {
            name: lines(value) if isinstance(fields[name].default, tuple) else value for name, value in settings.items()
        }
        changed = {name: value for name, value in values.items() if value != fields[name].default}
        return ({**(options or {}), **changed},)


class AdapterOptions(TrainOptions):
    GROUP = "adapter"
    DESCRIPTION = "What is trained: the kind of adapter, where it sits, how it starts, and how its file is written."
    SEARCH_ALIASES = ["dora", "loha", "lokr", "lora+", "rslora", "pissa", "text encoder training", "lycoris"]


class LossOptions(TrainOptions):
    GROUP = "loss"
    DESCRIPTION = "What counts as an error: weighting by noise level, robust losses, the noise and its timesteps."
    SEARCH_ALIASES = ["min snr gamma", "noise offset", "huber loss", "v prediction", "debiased estimation"]


class OptimizerOptions(TrainOptions):
    GROUP = "optimizer"
    DESCRIPTION = (
        "How the weights move: the optimizer, its constants, the learning rate over the run, the average kept."
    )
    SEARCH_ALIASES = ["adamw", "prodigy", "adafactor", "lion", "came", "ema", "schedule free", "learning rate"]


class CaptionOptions(TrainOptions):
    GROUP = "captions"
    DESCRIPTION = "What a step sees of the dataset: shuffled and dropped tags, long captions, masks, regularisation."
    SEARCH_ALIASES = ["shuffle tags", "tag dropout", "masked loss", "prior preservation", "dreambooth"]


class WatchOptions(TrainOptions):
    GROUP = "watch"
    DESCRIPTION = "What is measured and shown while it trains, what is kept, and when it stops by itself."
    SEARCH_ALIASES = ["validation loss", "early stopping", "sample images", "keep best", "epochs", "checkpoints"]


class MemoryOptions(TrainOptions):
    GROUP = "memory"
    DESCRIPTION = "How the run fits into memory."
    SEARCH_ALIASES = ["gradient checkpointing", "out of memory", "low vram", "micro batch"]
