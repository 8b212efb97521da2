"""Frozen weights that wait in main memory and are copied to the device when they are needed.

The device has the weights of at most two blocks: those of the block in use and those of its neighbour, which are copied
while the device computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes, as torch allocates on the CPU, where the last bit of a result depends on it
_WITH_STREAMS = ("cuda", "xpu")


class OffloadedBlocks:
    """The weights of an ordered list of blocks, in main memory; copies of them on `device`.

    `tensors` of a block copies what has not arrived, drops the other blocks and begins to copy the neighbour that comes
    next: after a step forward the following block, after a step backward the preceding one, and at either end the only
    neighbour. The host never waits. Not for use by several threads at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._packed: list[_Packed] = []
        self._copies: dict[int, _Copy] = {}
        self._current: int | None = None
        self._step = 1
        self._module: Any = torch.get_device_module(device) if device.type in _WITH_STREAMS else None
        self._stream: Any = self._module.Stream(device) if self._module else None

    def add(self, tensors: Sequence[Tensor]) -> int:
        """Copies the tensors of the next block to main memory, and returns the block's index."""
        self._packed.append(_pack(tensors, pinned=self._stream is not None))
        return len(self._packed) - 1

    def tensors(self, index: int) -> Sequence[Tensor]:
        """The tensors of the block on the device, contiguous, in the order of `add`.

        To be asked for at each use: whoever keeps them keeps their memory.
        """
        if index != self._current:
            self._move(index)
        copy = self._copies[index]
        self._wait(copy)
        return copy.tensors

    def evict(self) -> None:
        """Drops all copies on the device. The next use copies again."""
        for index in list(self._copies):
            self._drop(index)
        self._current, self._step = None, 1

    @property
    def block_bytes(self) -> list[int]:
        """The size of each block."""
        return [packed.host.nbytes for packed in self._packed]

    @property
    def window_bytes(self) -> int:
        """The largest size of what is on the device at once."""
        return largest_window(self.block_bytes)

    def _move(self, index: int) -> None:
        following = self._following(index)
        self._current = None  # until all copies have been allocated: memory may run out here
        for other in self._copies.keys() - {index, following}:
            self._drop(other)
        for wanted in (index, following):
            if wanted is not None and wanted not in self._copies:
                self._copies[wanted] = self._copy(wanted)
        self._current = index

    def _following(self, index: int) -> int | None:
        if self._current is not None:
            self._step = 1 if index > self._current else -1
        if not 0 <= index + self._step < len(self._packed):
            self._step = -self._step
        following = index + self._step
        return following if 0 <= following < len(self._packed) else None

    def _copy(self, index: int) -> _Copy:
        """A copy that may not have arrived. Not an inference tensor, as training uses it, too.

        Its memory is of the stream that computes, whose order says when it may be used again, so that no block is kept
        for longer than its computation. With memory of the other stream and `record_stream`, the blocks of all
        computations that are queued would be kept.
        """
        packed = self._packed[index]
        with torch.inference_mode(False), torch.no_grad():
            if self._stream is None:
                buffer = packed.host.to(self.device, copy=True)
                return _Copy(packed.views(buffer))
            buffer = torch.empty(packed.host.shape, dtype=torch.uint8, device=self.device)
            self._stream.wait_stream(self._module.current_stream(self.device))
            with self._module.stream(self._stream):
                buffer.copy_(packed.host, non_blocking=packed.host.is_pinned())
                return _Copy(packed.views(buffer), self._stream.record_event())

    def _wait(self, copy: _Copy) -> None:
        """What is computed from here on waits for the copy; the host does not."""
        if copy.arrival is not None:
            self._module.current_stream(self.device).wait_event(copy.arrival)
            copy.arrival = None

    def _drop(self, index: int) -> None:
        """Frees the memory for what is computed from here on, which must not overtake a copy that nobody used."""
        self._wait(self._copies[index])
        del self._copies[index]


def packed_bytes(sizes: Iterable[int]) -> int:
    """The bytes of a block with tensors of these sizes."""
    return sum(map(_aligned, sizes))


def largest_window(block_bytes: Sequence[int]) -> int:
    """The bytes of the two neighbours that are largest together; of one block if there is no second."""
    return max((one + other for one, other in pairwise(block_bytes)), default=sum(block_bytes))


@dataclass
class _Copy:
    """A block on the device. `arrival` is an event that has not been waited for."""

    tensors: tuple[Tensor, ...]
    arrival: Any = None


@dataclass(frozen=True)
class _Packed:
    """The tensors of a block in one buffer, so that one copy moves them. `templates` have no memory."""

    host: Tensor
    templates: tuple[Tensor, ...]

    def views(self, buffer: Tensor) -> tuple[Tensor, ...]:
        """The tensors in a buffer like `host`."""
        found, start = [], 0
        for like in self.templates:
            found.append(buffer[start : start + like.nbytes].view(like.dtype).view(like.shape))
            start += _aligned(like.nbytes)
        return tuple(found)


@torch.no_grad()
def _pack(tensors: Sequence[Tensor], pinned: bool) -> _Packed:
    templates = tuple(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor in tensors)
    packed = _Packed(_host_memory(packed_bytes(tensor.nbytes for tensor in tensors), pinned), templates)
    for view, tensor in zip(packed.views(packed.host), tensors, strict=True):
        view.copy_(tensor)
    return packed


def _host_memory(size: int, pinned: bool) -> Tensor:
    """Pinned memory is copied while the device computes. A system may refuse it; then copies only take longer."""
    if pinned:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:
            pass
    return torch.empty(size, dtype=torch.uint8)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
