"""StorageCount against closed forms, on real and on fake tensors, and the parts of a base without contents."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from sdxl_lora_core.sdxl import loading
from sdxl_lora_core.sdxl.base import SDXLBase, empty_part, load_part
from sdxl_lora_core.sdxl.family import Part
from sdxl_lora_core.training.optim.memory_count import StorageCount, fake_tensors, peak_of

SIZE = 1024
BYTES = 4 * SIZE
SCALAR = 4


@pytest.fixture(params=["real", "fake"])
def count(request: pytest.FixtureRequest) -> Iterator[StorageCount]:
    with fake_tensors() if request.param == "fake" else contextlib.nullcontext(), StorageCount() as count:
        yield count
    assert count.allocated == 0


def test_views_and_results_in_place_cost_nothing(count: StorageCount) -> None:
    tensor = torch.zeros(SIZE)
    view = tensor.view(32, 32)[3:].add_(1).t()
    assert count.allocated == count.peak == BYTES
    del tensor
    assert count.allocated == BYTES  # which the view keeps
    del view
    assert count.allocated == 0


def test_a_view_of_what_was_there_before_costs_nothing() -> None:
    before = torch.zeros(SIZE)
    assert peak_of(lambda: before.view(32, 32)[1:].mul_(2)) == 0
    assert peak_of(lambda: before + 1) == BYTES
    assert peak_of(lambda: torch.add(before, 1, out=torch.empty_like(before))) == BYTES


def test_lists_of_tensors(count: StorageCount) -> None:
    rows = list(torch.zeros(4, SIZE).unbind())
    assert count.allocated == 4 * BYTES
    sums = list(torch._foreach_add(rows, 1))
    assert count.allocated == 8 * BYTES
    del rows, sums[1:]
    assert count.allocated == BYTES


def test_an_output_that_is_resized(count: StorageCount) -> None:
    ones, out = torch.ones(SIZE), torch.empty(0)
    torch.add(ones, 1, out=out)
    assert count.allocated == 2 * BYTES
    del out
    assert count.allocated == BYTES


def test_an_empty_tensor_costs_nothing(count: StorageCount) -> None:
    tensor = torch.empty(0, 7)
    assert tensor.shape == (0, 7)
    assert count.peak == 0


def test_a_chain_forward_and_backward(count: StorageCount) -> None:
    leaf = torch.ones(SIZE, requires_grad=True)
    result = leaf.exp().exp().exp()  # each saves its result
    assert count.allocated == 4 * BYTES
    result.sum().backward()
    # The result is still held; while its gradient becomes that of its input, there are two gradients.
    assert count.peak == 4 * BYTES + 2 * BYTES + 2 * SCALAR
    del result
    assert count.allocated == 2 * BYTES  # of the leaf and its gradient


def test_a_graph_that_is_dropped(count: StorageCount) -> None:
    leaf = torch.ones(SIZE, requires_grad=True)
    loss = leaf.exp().exp().sum()
    assert count.allocated == 3 * BYTES + SCALAR
    del loss
    assert count.allocated == BYTES


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        square = x * x
        ctx.save_for_backward(square)
        return square * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (square,) = ctx.saved_tensors
        return 3 * square * grad


def test_what_an_autograd_function_saves(count: StorageCount) -> None:
    leaf = torch.ones(SIZE, requires_grad=True)
    result: Any = Cube.apply(leaf)
    assert count.allocated == 3 * BYTES
    del result
    assert count.allocated == BYTES


def test_a_layer_and_adamw(count: StorageCount) -> None:
    layer = nn.Linear(32, 32, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters(), foreach=True)
    layer(torch.ones(32)).sum().backward()
    optimizer.step()
    assert count.allocated - 4 * BYTES in (0, SCALAR)  # weight, gradient, two moments; perhaps the number of steps
    optimizer.zero_grad()
    assert count.allocated - 3 * BYTES in (0, SCALAR)


def test_sizes_are_rounded_up(count: StorageCount) -> None:
    with StorageCount(round_to=512) as rounded:
        tensors = [torch.zeros(1), torch.zeros(128), torch.zeros(129)]
    assert rounded.allocated == 512 + 512 + 1024
    del tensors
    assert rounded.allocated == 0


@pytest.mark.parametrize("part", ["unet", "text_encoder", "text_encoder_2"])
def test_a_part_without_contents_is_the_loaded_one(
    micro_base: SDXLBase, part: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_part(micro_base, part, torch.bfloat16)
    monkeypatch.setattr(loading, "find_weights", lambda folder: pytest.fail(f"looked for weights in {folder}"))
    with fake_tensors(), StorageCount() as count:
        empty = empty_part(micro_base, part, torch.bfloat16)
        assert described(empty) == described(loaded)
        tensors = [*empty.parameters(), *empty.buffers()]
        assert all(isinstance(tensor, FakeTensor) for tensor in tensors)
        assert count.allocated == sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        assert not empty.training


def described(module: nn.Module) -> dict[str, object]:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: (tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad) for name, tensor in tensors}


def test_a_layer_on_fake_tensors_can_be_converted() -> None:
    """peft converts the factors that it adds."""
    with fake_tensors():
        layer = nn.Linear(3, 5).to(torch.bfloat16)
        assert layer.weight.dtype == layer(torch.ones(3, dtype=torch.bfloat16)).dtype == torch.bfloat16
