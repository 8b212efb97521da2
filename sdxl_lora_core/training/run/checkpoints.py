"""The checkpoints of a run: safetensors and JSON, always complete, the newest two.

A checkpoint is a folder `step-000500/` of three files: `adapter.safetensors` (a LoRA in the run's format, which loaders
read), `state.safetensors` (the tensors for resuming) and `state.json`, written last, with the hashes of all files. The
folder gets its name only after everything has been written to disk.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...files import file_sha256, flush_to_disk, write_text_atomic
from ...runtime.device import copied_to_cpu
from ...safetensors_file import save_tensors
from .loop_state import LoopState
from .optimizer_state import restore_state, split_state

log = logging.getLogger("sdxl_lora")

SCHEMA = 4
KEPT = 2
ADAPTER, STATE = "adapter.safetensors", "state.safetensors"
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint. Its tensors are on disk; `optimizer` refers to those of the optimizer's state."""

    path: Path
    state: LoopState
    scaler: dict[str, Any]
    optimizer: Any

    def restore(self, weights: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Restores `weights`, in the order in which they were saved, and the optimizer."""
        tensors = load_file(self.path / STATE)
        for i, weight in enumerate(weights):
            weight.data.copy_(tensors[f"weight.{i}"])
        restore_state(optimizer, tensors, self.optimizer)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, in a folder that no other process writes to."""

    folder: Path
    fingerprint: str

    def save(
        self,
        state: LoopState,
        weights: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        scaler: dict[str, Any],
        write_adapter: Callable[[Path], object],
    ) -> None:
        """Writes `step-XXXXXX`, then removes all but the newest two. Raises OSError, and then removes none.

        `weights` are the trained parameters with their averages, in a fixed order.
        """
        final = self.folder / f"step-{state.step:06d}"
        temporary = self.folder / f".tmp-{uuid.uuid4().hex}"
        temporary.mkdir(parents=True)
        try:
            moments, plan = split_state(optimizer)
            tensors = {f"weight.{i}": weight for i, weight in enumerate(copied_to_cpu(weights))}
            save_tensors(temporary / STATE, tensors | moments)
            flush_to_disk(temporary / STATE)
            write_adapter(temporary / ADAPTER)
            hashes = {name: file_sha256(temporary / name) for name in (ADAPTER, STATE)}
            document = {
                "schema": SCHEMA,
                "fingerprint": self.fingerprint,
                "loop": asdict(state),
                "scaler": scaler,
                "optimizer": plan,
                "sha256": hashes,
            }
            write_text_atomic(temporary / "state.json", json.dumps({**document, "seal": _seal(document)}))
            if final.exists():
                shutil.rmtree(final)
            os.replace(temporary, final)
            flush_to_disk(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for _, old in _numbered(self.folder)[KEPT:]:
            if old != final:  # a run that went back to an earlier step needs this one
                shutil.rmtree(old, ignore_errors=True)

    @property
    def exist(self) -> bool:
        return bool(_numbered(self.folder))

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint; None if there is none.

        Raises ValueError for one of another version, which a new run would eventually delete.
        """
        for _, path in _numbered(self.folder):
            try:
                document = _verified(path, self.fingerprint)
            except (OSError, ValueError, KeyError) as error:
                log.warning("checkpoint %s is skipped: %s", path.name, error)
                continue
            if document["schema"] != SCHEMA:
                raise ValueError(
                    f"checkpoint {path.name} in {self.folder} has schema {document['schema']} and this version reads "
                    f"{SCHEMA}: finish the run with the version that started it, or start again with another lora_name"
                )
            state = LoopState.from_json(document["loop"])
            return Checkpoint(path, state, document["scaler"], document["optimizer"])
        return None

    def remove_after(self, step: int) -> None:
        """Removes the checkpoints of later steps."""
        for number, path in _numbered(self.folder):
            if number > step:
                shutil.rmtree(path, ignore_errors=True)

    def sweep(self) -> None:
        """Removes temporary folders of a process that was killed while saving. No other process writes here."""
        for leftover in self.folder.glob(".tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _verified(path: Path, fingerprint: str) -> dict[str, Any]:
    document = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if document["schema"] != SCHEMA:
        return document
    if document.pop("seal") != _seal(document):
        raise ValueError("state.json is damaged")
    if document["fingerprint"] != fingerprint:
        raise ValueError("it belongs to a run with other settings")
    for name, digest in document["sha256"].items():
        if file_sha256(path / name) != digest:
            raise ValueError(f"{name} is damaged")
    return document


def _seal(document: dict[str, Any]) -> str:
    """The hash of a document. Losses may be NaN, which canonical JSON does not allow."""
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints, the newest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)


def require_space(folder: Path, size: int, copies: int) -> None:
    """Raises OSError unless there is space for three checkpoints of `copies` times the parameters, and the LoRA.

    `size` is that of the parameters in bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    needed = (3 * copies + 1) * size
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"the run needs about {needed / 1e6:.0f} MB for its checkpoints and {free / 1e6:.0f} MB are free: "
            "free some space or lower the rank; training has not started",
        )
