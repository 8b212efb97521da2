"""What earlier versions wrote is still found and read. The stored values in tests/guards are those of version 0.3.0.

A failure here means that a user's finished runs, checkpoints or cached images would be lost with an update: change the
code, not the stored values. tests/guard_cases.py says how they were made.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from sdxl_lora_core.config import TrainConfig
from sdxl_lora_core.settings import setting
from tests.guard_cases import GUARDS, base, dataset, dataset_fingerprints, fingerprint, image_keys, run_fingerprints


def stored(name: str) -> dict[str, Any]:
    return json.loads((GUARDS / f"{name}.json").read_text(encoding="utf-8"))


# Fingerprints and keys


def test_data_sets_have_the_fingerprints_of_0_3_0() -> None:
    assert dataset_fingerprints() == stored("dataset_fingerprints")


def test_runs_have_the_fingerprints_of_0_3_0() -> None:
    assert run_fingerprints() == stored("run_fingerprints")


def test_images_have_the_keys_of_0_3_0() -> None:
    assert image_keys() == stored("image_keys")


@dataclass(frozen=True, kw_only=True)
class LaterConfig(TrainConfig):
    """As if a later version had added two settings, one of them outside of the fingerprint."""

    OUTSIDE_FINGERPRINT = (*TrainConfig.OUTSIDE_FINGERPRINT, "shown")
    sharpness: float = setting(0.0, "How sharp.", low=0, high=1, since="0.4.0")
    shown: bool = setting(False, "Whether it is shown.", since="0.4.0")


@pytest.mark.parametrize("changes", [{}, {"rank": 16, "seed": 3}], ids=str)
def test_a_setting_added_later_leaves_fingerprints_as_they_were_while_it_stands_at_its_default(
    changes: dict[str, Any],
) -> None:
    model, pictures = base(), dataset("masks")
    earlier = fingerprint(model, pictures, TrainConfig(**changes))
    assert fingerprint(model, pictures, LaterConfig(**changes)) == earlier
    assert fingerprint(model, pictures, LaterConfig(**changes, shown=True)) == earlier
    assert fingerprint(model, pictures, LaterConfig(**changes, sharpness=0.5)) != earlier
