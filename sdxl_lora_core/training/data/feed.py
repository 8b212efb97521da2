"""Prepares the next batch in a thread while the present one is computed.

A thread rather than worker processes: inside ComfyUI on Windows a spawned process would import ComfyUI's main module
again, and reading files and tensor operations release Python's lock. A batch depends on its pass only, so preparing it
early changes no number; a pass that changes after all, as when memory runs out, is simply prepared again.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ...runtime.device import can_pin
from .batches import Batch, PassOfUpdate, TrainingData


class Feed:
    """Batches of `data` on `device`. `close` ends its thread."""

    def __init__(self, data: TrainingData, device: torch.device) -> None:
        self.data, self.device = data, device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sdxl_lora feed")
        self._next: tuple[PassOfUpdate, Future[Batch]] | None = None

    def batch(self, current: PassOfUpdate, following: PassOfUpdate | None) -> Batch:
        """The batch of `current` on the device; then prepares that of `following`, if there is one."""
        prepared = self._next[1] if self._next and self._next[0] == current else None
        self._next = None  # if preparing it has failed, the next attempt must not find the failure
        batch = (prepared or self._thread.submit(self._load, current)).result().to(self.device)
        self._next = (following, self._thread.submit(self._load, following)) if following else None
        return batch

    def close(self) -> None:
        self._next = None
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _load(self, wanted: PassOfUpdate) -> Batch:
        batch = self.data.batch(wanted)
        return batch.pinned() if can_pin(self.device) else batch
