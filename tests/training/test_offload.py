"""Weights that wait in main memory: which blocks are copied when, and that the copies are the weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from sdxl_lora_core.runtime import offload
from sdxl_lora_core.runtime.offload import OffloadedBlocks, largest_window, packed_bytes

CPU = torch.device("cpu")


class Watched(OffloadedBlocks):
    """Notes each copy, and how many blocks are on the device at most."""

    def __init__(self, count: int) -> None:
        super().__init__(CPU)
        self.copied: list[int] = []
        self.most = 0
        for number in range(count):
            self.add([torch.full((3,), float(number))])

    def _copy(self, index: int) -> Any:
        self.copied.append(index)
        self.most = max(self.most, len(self._copies) + 1)
        return super()._copy(index)


def visit(blocks: OffloadedBlocks, order: Sequence[int]) -> None:
    for index in order:
        assert blocks.tensors(index)[0].tolist() == [index] * 3


def test_the_copies_are_the_tensors_and_aligned() -> None:
    torch.manual_seed(0)
    tensors = [
        torch.randn(3, 5),
        torch.randn(7).bfloat16(),
        torch.arange(5, dtype=torch.int8),
        torch.randn(4, 3).to(torch.float8_e4m3fn),
        torch.randn(2, 3, 3, 3)[:, ::2],
        torch.tensor(2.0),
        torch.empty(0, 3),
        torch.nn.Parameter(torch.randn(2)),
    ]
    blocks = OffloadedBlocks(CPU)
    index = blocks.add(tensors)
    for found, wanted in zip(blocks.tensors(index), tensors, strict=True):
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        assert torch.equal(found.float(), wanted.float())
        assert found.data_ptr() % 64 == 0 and found.is_contiguous() and not found.requires_grad


def test_a_change_of_the_original_changes_nothing() -> None:
    weight = torch.ones(3)
    blocks = OffloadedBlocks(CPU)
    blocks.add([weight])
    weight.zero_()
    assert blocks.tensors(0)[0].tolist() == [1, 1, 1]


def test_each_pass_copies_each_block_once_and_one_ahead() -> None:
    blocks = Watched(5)
    visit(blocks, [0, 0])
    assert blocks.copied == [0, 1]
    visit(blocks, [1, 1])
    assert blocks.copied == [0, 1, 2]
    visit(blocks, [2, 3, 4])
    assert blocks.copied == [0, 1, 2, 3, 4]
    blocks.copied.clear()
    visit(blocks, [4, 3])
    assert blocks.copied == [2]  # block 3 had stayed
    visit(blocks, [3, 2, 1, 0, 0])
    assert blocks.copied == [2, 1, 0]
    blocks.copied.clear()
    visit(blocks, [0, 1, 2])
    assert blocks.copied == [2, 3]
    assert blocks.most == 2


def test_passes_without_a_backward_pass() -> None:
    """As in validation: from the last block to the first."""
    blocks = Watched(4)
    visit(blocks, [0, 1, 2, 3])
    blocks.copied.clear()
    visit(blocks, [0, 1, 2, 3])
    assert blocks.copied == [0, 1, 2, 3]
    assert blocks.most == 2


@pytest.mark.parametrize("count", [1, 2])
def test_up_to_two_blocks_are_copied_once(count: int) -> None:
    blocks = Watched(count)
    visit(blocks, [*range(count), *reversed(range(count))] * 2)
    assert blocks.copied == [*range(count)]


def test_any_order_of_blocks() -> None:
    blocks = Watched(6)
    visit(blocks, torch.randint(6, (100,), generator=torch.Generator().manual_seed(0)).tolist())
    assert blocks.most == 2


def test_evicted_blocks_are_copied_again() -> None:
    blocks = Watched(3)
    visit(blocks, [2, 1])
    blocks.evict()
    blocks.copied.clear()
    visit(blocks, [1])
    assert blocks.copied == [1, 2]  # forward again


def test_after_an_error_while_copying_the_blocks_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = Watched(3)
    visit(blocks, [0])

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError

    for index in (1, 2, 0):
        with monkeypatch.context() as patch:
            patch.setattr(Watched, "_copy", fail)
            with pytest.raises(torch.OutOfMemoryError):
                blocks.tensors(index)
    visit(blocks, [0, 1, 2, 1, 0])
    assert blocks.most == 2


def test_copies_made_in_inference_mode_can_be_trained_through() -> None:
    blocks = Watched(2)
    with torch.inference_mode():
        visit(blocks, [0])
    x = torch.ones(3, requires_grad=True)
    (x * blocks.tensors(1)[0]).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1, 1, 1]


def test_bytes() -> None:
    blocks = OffloadedBlocks(CPU)
    sizes: list[list[Tensor]] = [[torch.empty(1)], [torch.empty(16), torch.empty(17)], [torch.empty(32)]]
    for tensors in sizes:
        blocks.add(tensors)
    assert blocks.block_bytes == [64, 192, 128]
    assert blocks.block_bytes[1] == packed_bytes([64, 68])
    assert blocks.window_bytes == 320
    assert largest_window([]) == 0 and largest_window([5]) == 5


class Stream:
    """A stream that notes what it waits for and does."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name, self.notes, self.events = name, notes, 0

    def wait_stream(self, other: Stream) -> None:
        self.notes.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        self.events += 1
        self.notes.append(f"copy {self.events} arrives")
        return f"copy {self.events}"

    def wait_event(self, event: str) -> None:
        self.notes.append(f"{self.name} waits for {event}")


class Streams:
    """What torch.cuda has of streams, on the CPU."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.computing, self.copying = Stream("compute", self.notes), Stream("side", self.notes)

    def Stream(self, device: torch.device) -> Stream:  # noqa: N802
        return self.copying

    def current_stream(self, device: torch.device) -> Stream:
        return self.computing

    def stream(self, stream: Stream) -> Any:
        return nullcontext()


def test_streams_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy waits for the computations that used its memory, and who uses or frees the memory for the copy."""
    streams = Streams()
    monkeypatch.setattr(offload, "_WITH_STREAMS", ("cpu",))
    monkeypatch.setattr(torch, "get_device_module", lambda device: streams)
    blocks = OffloadedBlocks(CPU)
    for number in range(4):
        blocks.add([torch.full((3,), float(number))])

    def noted(index: int) -> list[str]:
        streams.notes.clear()
        visit(blocks, [index])
        return list(streams.notes)

    copies = [["side waits for compute", f"copy {number} arrives"] for number in range(6)]
    assert noted(0) == [*copies[1], *copies[2], "compute waits for copy 1"]
    assert noted(0) == []
    assert noted(1) == [*copies[3], "compute waits for copy 2"]
    # Copy 3, of block 2, is freed without a use.
    assert noted(0) == ["compute waits for copy 3", *copies[4], "compute waits for copy 4"]
    assert noted(1) == copies[5]
    streams.notes.clear()
    blocks.evict()
    assert streams.notes == ["compute waits for copy 5"]
