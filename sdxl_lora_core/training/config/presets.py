"""Starting points for common jobs, as settings of TrainConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ...settings import fields_of
from .train_config import TrainConfig

Preset = Literal["none", "character", "style", "object", "low memory (8 GB)", "fast test"]

PRESETS: Mapping[Preset, Mapping[str, Any]] = {
    "none": {},
    # A face has to keep its detail in any surroundings: more rank, and captions that are sometimes left out.
    "character": {
        "rank": 16,
        "alpha": 8.0,
        "lr_schedule": "cosine",
        "lr_warmup_steps": 50,
        "snr_gamma": 5.0,
        "target_modules": "all-linear",
        "caption_dropout": 0.05,
    },
    # A style is in texture and light: convolutions learn, too, and the noise offset lets brightness move.
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
    # One thing from few images: attention alone, so that less is memorised.
    "object": {
        "alpha": 8.0,
        "lr_warmup_steps": 50,
        "snr_gamma": 5.0,
        "dropout": 0.05,
    },
    "low memory (8 GB)": {
        "gradient_accumulation": 4,
        "gradient_checkpointing": "on",
    },
    "fast test": {"steps": 60, "rank": 4, "alpha": 4.0, "learning_rate": 5e-4, "sample_steps": 12},
}


def with_preset(settings: Mapping[str, Any], preset: Preset) -> dict[str, Any]:
    """`settings` with the preset's value wherever the setting is missing or still stands at its default.

    What somebody has changed wins: a preset's value that would contradict it is left out.
    """
    filled = dict(settings)
    for name, value in PRESETS[preset].items():
        default = fields_of(TrainConfig)[name].default
        if filled.get(name, default) == default and _accepted({**filled, name: value}):
            filled[name] = value
    return filled


def _accepted(settings: Mapping[str, Any]) -> bool:
    try:
        TrainConfig(**settings)
    except ValueError:
        return False
    return True
