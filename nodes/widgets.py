"""The widgets that stand for a setting, and the settings that come back from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..sdxl_lora_core.settings import Config, choices_of, default, fields_of, from_mapping, types_of
from ..sdxl_lora_core.training.config.presets import Preset, with_preset
from ..sdxl_lora_core.training.config.train_config import TrainConfig

Widget = tuple[str | list[str], dict[str, Any]]


def widget(
    config: type[Config],
    option: str,
    kind: str | Sequence[str],
    tooltip: str,
    **options: Any,
) -> Widget:
    """An input for one setting, with its one stated default. A sequence of choices makes a combo."""
    declared = kind if isinstance(kind, str) else list(kind)
    return declared, {"default": default(config, option), "tooltip": tooltip, **options}


def train_widget(option: str, **more: Any) -> Widget:
    """An input for one setting of a training run: kind, choices, default, range and help are the setting's own."""
    field, kind = fields_of(TrainConfig)[option], types_of(TrainConfig)[option]
    shown: dict[str, Any] = {"default": field.default, "tooltip": field.metadata["help"]}
    if choices := choices_of(TrainConfig, option):
        return list(choices), {**shown, **more}
    if kind in (int, float):
        shown |= {"min": field.metadata["low"], "max": field.metadata["high"]}
    if kind is float:
        shown |= {"step": field.metadata["step"] or 0.01, "round": False}
    if option == "seed":  # else the page adds a widget that changes it after every run
        shown["control_after_generate"] = False
    if isinstance(field.default, tuple):  # a line each
        shown |= {"default": "\n".join(field.default), "multiline": True}
    return {int: "INT", float: "FLOAT", bool: "BOOLEAN"}.get(kind, "STRING"), {**shown, **more}


def train_config(options: Mapping[str, Any] | None, widgets: Mapping[str, Any], preset: Preset = "none") -> TrainConfig:
    """The widgets' settings with those of TRAIN_OPTIONS; the preset fills what stands at its default in both.

    Raises ValueError for an unknown option, and for one that contradicts a widget that was changed.
    """
    settings = dict(widgets)
    if isinstance(settings.get("sample_prompts"), str):
        settings["sample_prompts"] = lines(settings["sample_prompts"])
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    for option, value in (options or {}).items():
        if option not in known:
            raise ValueError(f"options: unknown setting {option}; known are {', '.join(sorted(known))}")
        chosen = settings.get(option, value)
        if chosen not in (value, default(TrainConfig, option)):
            raise ValueError(f"options sets {option} to {value}, the widget {option} to {chosen}: set only one of them")
        settings[option] = value
    return from_mapping(TrainConfig, with_preset(settings, preset), "TrainSDXLLoRA")


def lines(text: str) -> tuple[str, ...]:
    """The lines of a multiline widget that are not empty."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())
