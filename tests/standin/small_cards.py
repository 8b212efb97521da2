"""Stored weights on the stand-in accelerator: what is on the device, and that nothing is left there.

Collected by name only, in a process with `-p tests.standin.plugin`: see test_standin.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sdxl_lora_core.runtime.device import move_module
from sdxl_lora_core.runtime.offload import OffloadedBlocks
from sdxl_lora_core.sdxl.base import SDXLBase, load_part
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.model.adapters import Adapter
from sdxl_lora_core.training.model.base_weights import WeightFormat, store_weights, stored_bytes
from sdxl_lora_core.training.model.flat_parameters import FlatParameters
from tests.standin.accelerator import ACCEL, NAME

DEVICE, CPU = torch.device(NAME, 0), torch.device("cpu")
FORMS: tuple[WeightFormat, ...] = ("full", "fp8", "int8")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    allocated = ACCEL.allocated
    yield
    assert ACCEL.allocated == allocated


class Blocks(OffloadedBlocks):
    """Counts the blocks whose memory is on the device. The tensors of one are views of one storage."""

    most = 0

    def _copy(self, index: int) -> Any:
        before = ACCEL.allocated
        copy = super()._copy(index)
        assert ACCEL.allocated == before + self.block_bytes[index]
        self.most = max(self.most, len(self._copies) + 1)
        return copy


def test_the_device_has_two_blocks_at_most() -> None:
    before = ACCEL.allocated
    blocks = Blocks(DEVICE)
    for size in (10, 2000, 300, 40):
        blocks.add([torch.ones(size), torch.zeros(3, dtype=torch.int8)])
    assert ACCEL.allocated == before
    ACCEL.peak = before
    for index in (0, 1, 2, 3, 3, 2, 1, 0, 0, 1, 2, 3, 0):
        ones, zeros = blocks.tensors(index)
        assert ones.device.type == zeros.device.type == NAME and ones.sum() == ones.numel()
        del ones, zeros
        assert ACCEL.allocated - before <= blocks.window_bytes
    assert blocks.most == 2
    assert ACCEL.allocated > before
    blocks.evict()
    assert ACCEL.allocated == before


def test_where_memory_runs_out_the_blocks_can_be_used_again() -> None:
    blocks = Blocks(DEVICE)
    for _ in range(3):
        blocks.add([torch.ones(16)])
    before = ACCEL.allocated
    with ACCEL.limited(100), pytest.raises(torch.OutOfMemoryError):
        blocks.tensors(0)
    with ACCEL.limited(128 + 64 - (ACCEL.allocated - before)):
        for index in (0, 1, 2, 1, 0):
            assert blocks.tensors(index)[0].sum() == 16


def loaded(base: SDXLBase, form: WeightFormat, offloaded: int, device: torch.device) -> tuple[Any, Any, FlatParameters]:
    unet: Any = load_part(base, "unet", torch.float32)
    adapter = Adapter(unet, TrainConfig(rank=2))
    torch.manual_seed(0)
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    blocks = store_weights(unet, form, offloaded, device)
    move_module(unet, device)
    flat = FlatParameters(adapter.groups, adapter.scales, torch.float32)
    adapter.fuse(flat)
    return unet, blocks, flat


def step(unet: Any, flat: FlatParameters, device: torch.device) -> list[Tensor]:
    """The prediction and the gradients."""
    draw = torch.Generator().manual_seed(1)
    sample, embeds = torch.randn(1, 4, 16, 16, generator=draw), torch.randn(1, 7, 20, generator=draw)
    added = {"text_embeds": torch.ones(1, 16).to(device), "time_ids": torch.ones(1, 6).to(device)}
    timestep = torch.tensor([500]).to(device)
    result = unet(sample.to(device), timestep, encoder_hidden_states=embeds.to(device), added_cond_kwargs=added).sample
    result.square().sum().backward()
    flat.collect()
    return [result.detach().to("cpu"), flat.gradients.to("cpu")]


@pytest.mark.parametrize(
    ("form", "offloaded"),
    [
        ("full", 6),
        ("full", 1000),
        ("fp8", 1000),
        ("int8", 0),
        *(pytest.param(form, 6, marks=pytest.mark.accept) for form in ("fp8", "int8")),
    ],
)
def test_a_step_is_the_cpus(micro_base: SDXLBase, form: WeightFormat, offloaded: int) -> None:
    reference, _, reference_flat = loaded(micro_base, form, 0, CPU)
    unet, _, flat = loaded(micro_base, form, offloaded, DEVICE)
    assert all(map(torch.equal, step(unet, flat, DEVICE), step(reference, reference_flat, CPU)))


@pytest.mark.parametrize("form", FORMS)
def test_the_device_has_what_was_planned(micro_base: SDXLBase, form: WeightFormat) -> None:
    start = ACCEL.allocated
    unet, blocks, flat = loaded(micro_base, form, 1000, DEVICE)
    plain: Any = load_part(micro_base, "unet", torch.float32)
    planned = stored_bytes(plain, form, 1000)
    trained = ACCEL.allocated - start - planned.resident
    own = (flat.values, flat.gradients, flat.low, flat.pass_gradients)
    assert trained == sum(tensor.nbytes for tensor in own)
    assert planned.resident < 0.5 * stored_bytes(plain, "full", 0).resident
    step(unet, flat, DEVICE)
    assert ACCEL.allocated - start - trained - planned.resident <= blocks.window_bytes
    blocks.evict()
    assert ACCEL.allocated - start == trained + planned.resident


@pytest.mark.parametrize("form", FORMS)
def test_loading_takes_little_more_than_what_stays(micro_base: SDXLBase, form: WeightFormat) -> None:
    unet: Any = load_part(micro_base, "unet", torch.float32)
    largest = max(weight.nbytes for weight in unet.parameters())
    planned, start = stored_bytes(unet, form, 6), ACCEL.allocated
    ACCEL.peak = start
    store_weights(unet, form, 6, DEVICE)
    move_module(unet, DEVICE)
    assert ACCEL.allocated - start == planned.resident
    assert ACCEL.peak - start <= planned.resident + 3 * largest


def test_a_step_peaks_lower_with_offloaded_blocks(micro_base: SDXLBase) -> None:
    peaks = []
    for offloaded in (0, 6, 1000):
        unet, _, flat = loaded(micro_base, "full", offloaded, DEVICE)
        ACCEL.peak = ACCEL.allocated
        step(unet, flat, DEVICE)
        peaks.append(ACCEL.peak)
        del unet, flat, _
    assert peaks[0] > peaks[1] > peaks[2]
