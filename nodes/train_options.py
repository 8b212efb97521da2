"""The further settings of a training run: one node per group, on a link that chains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ..sdxl_lora_core.settings import fields_of
from ..sdxl_lora_core.training.config.adapter import AdapterSettings
from ..sdxl_lora_core.training.config.captions import CaptionSettings
from ..sdxl_lora_core.training.config.loss import LossSettings
from ..sdxl_lora_core.training.config.memory import MemorySettings
from ..sdxl_lora_core.training.config.optimizer import OptimizerSettings
from ..sdxl_lora_core.training.config.watch import WatchSettings
from . import choices, training
from .widgets import Widget, lines, link, widget
from .wires import CATEGORY


class TrainOptions:
    """The settings of GROUP that Train SDXL LoRA does not have itself.

    Only changed settings are passed on, so that a preset can fill the others. FILES are the settings that name a file,
    with its kind.
    """

    GROUP: ClassVar[type]
    FILES: ClassVar[Mapping[str, choices.Kind]] = {}
    CATEGORY = f"{CATEGORY}/options"
    RETURN_TYPES = ("TRAIN_OPTIONS",)
    RETURN_NAMES = ("options",)
    OUTPUT_TOOLTIPS = ("The changed settings, for Train SDXL LoRA or a further options node.",)
    FUNCTION = "collect"

    @classmethod
    def settings(cls) -> list[str]:
        return [name for name in fields_of(cls.GROUP) if name not in (*training.FACE, *training.ADVANCED)]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        chain = link("TRAIN_OPTIONS", "Settings from another options node. Where both set one, this node wins.")
        return {"required": {}, "optional": {"options": chain, **{name: cls.widget(name) for name in cls.settings()}}}

    @classmethod
    def widget(cls, name: str) -> Widget:
        kind, shown = widget(cls.GROUP, name)
        return (
            choices.combo(cls.FILES[name], shown["tooltip"], first=choices.NONE) if name in cls.FILES else (kind, shown)
        )

    @classmethod
    def check_file(cls, name: str, value: str | None) -> bool | str:
        return value in ("", choices.NONE) or choices.check(cls.FILES[name], value)

    @classmethod
    def IS_CHANGED(cls, **settings: Any) -> str:
        """Changes when another file has the same name."""
        return " ".join(choices.content(kind, settings.get(name)) for name, kind in cls.FILES.items())

    def collect(self, options: Mapping[str, Any] | None = None, **settings: Any) -> tuple[dict[str, Any]]:
        fields = fields_of(self.GROUP)
        values = {
            name: lines(value) if isinstance(fields[name].default, tuple) else value for name, value in settings.items()
        }
        values |= {name: "" for name in self.FILES if values.get(name) == choices.NONE}
        changed = {name: value for name, value in values.items() if value != fields[name].default}
        return ({**(options or {}), **changed},)


class AdapterOptions(TrainOptions):
    GROUP = AdapterSettings
    FILES = {"continue_from": "lora"}
    DESCRIPTION = "The adapter: its kind, the layers it is on, how it is initialised and saved."
    SEARCH_ALIASES = ["dora", "loha", "lokr", "lora+", "rslora", "pissa", "text encoder training", "lycoris"]

    @classmethod
    def VALIDATE_INPUTS(cls, continue_from: str | None = None) -> bool | str:
        return cls.check_file("continue_from", continue_from)


class LossOptions(TrainOptions):
    GROUP = LossSettings
    DESCRIPTION = "The loss: weighting by noise level, robust losses, the noise and its timesteps."
    SEARCH_ALIASES = ["min snr gamma", "noise offset", "huber loss", "v prediction", "debiased estimation"]


class OptimizerOptions(TrainOptions):
    GROUP = OptimizerSettings
    DESCRIPTION = "The optimizer, its hyperparameters, the learning rate schedule, and the moving average."
    SEARCH_ALIASES = ["adamw", "prodigy", "adafactor", "lion", "came", "ema", "schedule free", "learning rate"]


class CaptionOptions(TrainOptions):
    GROUP = CaptionSettings
    DESCRIPTION = (
        "How captions are used: tag shuffling and dropout, long captions, masks, regularisation images, new tokens."
    )
    SEARCH_ALIASES = ["shuffle tags", "tag dropout", "masked loss", "prior preservation", "dreambooth"]


class WatchOptions(TrainOptions):
    GROUP = WatchSettings
    FILES = {"clip_model": "clip"}
    DESCRIPTION = "Validation, samples and metrics during training, the step to save, and early stopping."
    SEARCH_ALIASES = ["validation loss", "early stopping", "sample images", "keep best", "epochs", "checkpoints"]

    @classmethod
    def VALIDATE_INPUTS(cls, clip_model: str | None = None) -> bool | str:
        return cls.check_file("clip_model", clip_model)


class MemoryOptions(TrainOptions):
    GROUP = MemorySettings
    DESCRIPTION = "How much memory training takes."
    SEARCH_ALIASES = ["gradient checkpointing", "out of memory", "low vram", "micro batch"]
