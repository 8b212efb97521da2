"""Creates widgets from settings, and settings from the values of widgets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..sdxl_lora_core.settings import Range, choices_of, declared, default, fields_of, from_mapping, types_of
from ..sdxl_lora_core.training.config.presets import Preset, with_preset
from ..sdxl_lora_core.training.config.train_config import TrainConfig

Widget = tuple[str | list[str], dict[str, Any]]
_KINDS = {int: "INT", float: "FLOAT", bool: "BOOLEAN"}


def widget(config: type, option: str, **more: Any) -> Widget:
    """The widget of a setting: type, choices, default, range and help as declared, with `more` options of ComfyUI."""
    kind = types_of(config)[option]
    shown: dict[str, Any] = {"default": default(config, option), "tooltip": declared(config, option).help}
    if choices := choices_of(config, option):
        return list(choices), {**shown, **more}
    if isinstance(shown["default"], tuple):  # one item per line
        shown |= {"default": "\n".join(shown["default"]), "multiline": True}
    shown |= _limits(kind, declared(config, option).range)
    if option == "seed":  # by default the frontend adds a widget that changes the seed after every run
        shown["control_after_generate"] = False
    return _KINDS.get(kind, "STRING"), {**shown, **more}


def widgets(config: type, options: Iterable[str], **more: Any) -> dict[str, Widget]:
    return {option: widget(config, option, **more) for option in options}


def _limits(kind: type, allowed: Range | None) -> dict[str, Any]:
    if allowed is None:
        return {}
    limits: dict[str, Any] = {"min": allowed.low, "max": allowed.high}
    if kind is float:
        return {**limits, "step": allowed.step or 0.01, **({} if allowed.rounded else {"round": False})}
    return {**limits, **({"step": allowed.step} if allowed.step else {})}


def train_config(
    options: Mapping[str, Any] | None, widgets: Mapping[str, Any], preset: Preset = "none"
) -> tuple[TrainConfig, list[str]]:
    """The settings of a run: of the widgets, of TRAIN_OPTIONS, and of the preset where both are at their default.

    The second value has a line for each setting of the preset that does not fit and is left out. Raises ValueError for
    an unknown option, and for one that contradicts a changed widget.
    """
    settings = dict(widgets)
    if isinstance(settings.get("sample_prompts"), str):
        settings["sample_prompts"] = lines(settings["sample_prompts"])
    known = fields_of(TrainConfig)
    for option, value in (options or {}).items():
        if option not in known:
            raise ValueError(f"options: unknown setting {option}; known are {', '.join(sorted(known))}")
        chosen = settings.get(option, value)
        if chosen not in (value, known[option].default):
            raise ValueError(f"options sets {option} to {value}, the widget {option} to {chosen}: set only one of them")
        settings[option] = value
    filled, left_out = with_preset(settings, preset)
    return from_mapping(TrainConfig, filled), left_out


def lines(text: str) -> tuple[str, ...]:
    """The lines of a multiline widget that are not empty."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def save_help(folder: str, files: str) -> str:
    """The tooltip of a name under which a node saves several files."""
    return f"The name of a folder in output/{folder}, for the {files}. If it is taken, a number is appended."


def link(kind: str, tooltip: str, force: bool = False) -> Widget:
    """An input for a link only. `force`: of a kind that would have a widget, such as STRING."""
    return kind, {"tooltip": tooltip, **({"forceInput": True} if force else {})}


def settings_in(config: type, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a node that are settings of `config`."""
    return {name: inputs[name] for name in fields_of(config) if name in inputs}
