"""Further settings of a training run, a node for each group of them, on a link that chains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ..sdxl_lora_core.settings import fields_of
from ..sdxl_lora_core.training.config.train_config import TrainConfig
from . import choices
from .widgets import Widget, lines, train_widget
from .wires import CATEGORY

NO_FILE = "(none)"


class TrainOptions:
    """The settings of one group. Only those that were changed travel on, so that a preset can fill the others.

    FILES are the settings that name a file, with its kind.
    """

    GROUP: ClassVar[str]
    FILES: ClassVar[Mapping[str, choices.Kind]] = {}
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
        return {"required": {}, "optional": {"options": chain, **{name: cls.widget(name) for name in cls.settings()}}}

    @classmethod
    def widget(cls, name: str) -> Widget:
        kind, shown = train_widget(name)
        if name not in cls.FILES:
            return kind, shown
        return [NO_FILE, *choices.names(cls.FILES[name])], {**shown, "default": NO_FILE}

    @classmethod
    def check_file(cls, name: str, value: str | None) -> bool | str:
        return value in ("", NO_FILE) or choices.check(cls.FILES[name], value)

    @classmethod
    def IS_CHANGED(cls, **settings: Any) -> str:
        """Another file under the same name is another setting."""
        return " ".join(choices.content(kind, settings.get(name), choices.stamp) for name, kind in cls.FILES.items())

    def collect(self, options: Mapping[str, Any] | None = None, **settings: Any) -> tuple[dict[str, Any]]:
        fields = fields_of(TrainConfig)
        values = {
            name: lines(value) if isinstance(fields[name].default, tuple) else value for name, value in settings.items()
        }
        values |= {name: "" for name in self.FILES if values.get(name) == NO_FILE}
        changed = {name: value for name, value in values.items() if value != fields[name].default}
        return ({**(options or {}), **changed},)


class AdapterOptions(TrainOptions):
    GROUP = "adapter"
    FILES = {"continue_from": "lora"}
    DESCRIPTION = "What is trained: the kind of adapter, where it sits, how it starts, and how its file is written."
    SEARCH_ALIASES = ["dora", "loha", "lokr", "lora+", "rslora", "pissa", "text encoder training", "lycoris"]

    @classmethod
    def VALIDATE_INPUTS(cls, continue_from: str | None = None) -> bool | str:
        return cls.check_file("continue_from", continue_from)


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
    FILES = {"clip_model": "clip"}
    DESCRIPTION = "What is measured and shown while it trains, what is kept, and when it stops by itself."
    SEARCH_ALIASES = ["validation loss", "early stopping", "sample images", "keep best", "epochs", "checkpoints"]

    @classmethod
    def VALIDATE_INPUTS(cls, clip_model: str | None = None) -> bool | str:
        return cls.check_file("clip_model", clip_model)


class MemoryOptions(TrainOptions):
    GROUP = "memory"
    DESCRIPTION = "How the run fits into memory."
    SEARCH_ALIASES = ["gradient checkpointing", "out of memory", "low vram", "micro batch"]
