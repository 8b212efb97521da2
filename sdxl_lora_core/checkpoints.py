"""A run's state on disk: safetensors and JSON, whole or not there, two kept.

A checkpoint is a folder `step-000500/`; `state.json` with the hashes of the other files is written last, and the
folder gets its name only after that.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .files import file_sha256, write_text_atomic

log = logging.getLogger("sdxl_lora")
SCHEMA = 1
KEPT = 2
_NAME = re.compile(r"step-(\d{6,})")


@dataclass
class LoopState:
    """What a run needs to go on as if it had never stopped. Randomness depends on the step only, so it is not in it."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    first_validation_loss: float | None = None


def save_checkpoint(
    folder: Path, fingerprint: str, state: LoopState, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer,
    scaler: dict[str, Any],
) -> Path:  # fmt: skip
    """Writes `folder/step-XXXXXX`, then removes all but the newest two. On failure raises OSError and removes none."""
    final = folder / f"step-{state.step:06d}"
    temporary = folder / f".tmp-{uuid.uuid4().hex}"
    temporary.mkdir(parents=True)
    try:
        tensors = {f"parameter.{i}": parameter.detach().cpu().contiguous() for i, parameter in enumerate(parameters)}
        save_file(tensors | _moments(optimizer), temporary / "state.safetensors")
        document = {
            "schema": SCHEMA,
            "fingerprint": fingerprint,
            "loop": asdict(state),
            "scaler": scaler,
            "sha256": {"state.safetensors": file_sha256(temporary / "state.safetensors")},
        }
        write_text_atomic(temporary / "state.json", json.dumps(document))
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for _, old in _numbered(folder)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_newest(
    folder: Path, fingerprint: str, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> tuple[LoopState, dict[str, Any]] | None:
    """Restores parameters and optimizer from the newest checkpoint that is whole; None if there is none."""
    for _, path in _numbered(folder):
        try:
            document = _verified(path, fingerprint)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            log.warning("checkpoint %s is passed over: %s", path.name, error)
            continue
        tensors = load_file(path / "state.safetensors")
        for i, parameter in enumerate(parameters):
            parameter.data.copy_(tensors[f"parameter.{i}"])
        _restore_moments(optimizer, tensors)
        return LoopState(**document["loop"]), document["scaler"]
    return None


def _verified(path: Path, fingerprint: str) -> dict[str, Any]:
    document = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if document["schema"] != SCHEMA:
        raise ValueError(f"it has schema {document['schema']}, this version reads {SCHEMA}")
    if document["fingerprint"] != fingerprint:
        raise ValueError("it belongs to a run with other settings")
    for name, digest in document["sha256"].items():
        if file_sha256(path / name) != digest:
            raise ValueError(f"{name} is damaged")
    return document


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints, the newest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{index}.{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for index, values in state.items()
        for name, value in values.items()
    }


def _restore_moments(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
