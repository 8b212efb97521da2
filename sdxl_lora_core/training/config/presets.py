"""Starting points for common jobs, as settings of TrainConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ...settings import fields_of, without_effect
from .train_config import TrainConfig

Preset = Literal["none", "character", "style", "object", "low memory (8 GB)", "low memory (6 GB)", "fast test"]

PRESETS: Mapping[Preset, Mapping[str, Any]] = {
    "none": {},
    # A face must keep its detail in any context: a higher rank, and some caption dropout.
    "character": {
        "rank": 16,
        "alpha": 8.0,
        "lr_schedule": "cosine",
        "lr_warmup_steps": 50,
        "snr_gamma": 5.0,
        "target_modules": "all-linear",
        "caption_dropout": 0.05,
    },
    # A style is in texture and light: convolutions are trained as well, and the noise offset frees brightness.
    "style": {
        "rank": 16,
        "alpha": 16.0,
        "lr_schedule": "cosine",
        "lr_warmup_steps": 50,
        "snr_gamma": 5.0,
        "target_modules": "all-linear+conv",
        "noise_offset": 0.03,
        "caption_dropout": 0.1,
    },
    # One object from few images: attention layers only, so that less is memorised.
    "object": {
        "alpha": 8.0,
        "lr_warmup_steps": 50,
        "snr_gamma": 5.0,
        "dropout": 0.05,
    },
    # The fastest plan within what a card of that size has left beside a desktop.
    "low memory (8 GB)": {"gradient_accumulation": 4, "base_weights": "auto", "memory_limit_gb": 7.0},
    "low memory (6 GB)": {"gradient_accumulation": 4, "base_weights": "auto", "memory_limit_gb": 4.5},
    "fast test": {"steps": 60, "rank": 4, "alpha": 4.0, "learning_rate": 5e-4, "sample_steps": 12},
}


def with_preset(settings: Mapping[str, Any], preset: Preset) -> tuple[dict[str, Any], list[str]]:
    """`settings` with the preset's value wherever a setting is missing or at its default.

    Settings that the user has changed are kept. A value of the preset that contradicts them is left out; the second
    value has a line for each of those, with the reason.
    """
    filled, left_out = dict(settings), []
    for name, value in PRESETS[preset].items():
        default = fields_of(TrainConfig)[name].default
        if filled.get(name, default) != default:
            continue
        if reason := _misfit({**filled, name: value}, name):
            left_out.append(f"preset {preset}: {name} {value} is left out, because {reason}")
        else:
            filled[name] = value
    return filled, left_out


def _misfit(settings: Mapping[str, Any], name: str) -> str | None:
    """Why a setting contradicts the others, or has no effect with them."""
    try:
        return without_effect(TrainConfig(**settings)).get(name)
    except ValueError as error:
        return str(error)
