"""Stored weights: quantised ones against closed forms, layers against torch's own, and a UNet against itself."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from sdxl_lora_core.runtime.offload import OffloadedBlocks
from sdxl_lora_core.sdxl.base import SDXLBase, load_part
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.model.adapters import Adapter
from sdxl_lora_core.training.model.base_weights import (
    StoredConv2d,
    StoredLayer,
    StoredLinear,
    WeightFormat,
    bias_of,
    dense,
    quantised,
    spread,
    store_weights,
    stored_bytes,
    weight_blocks,
)
from sdxl_lora_core.training.model.flat_parameters import FlatParameters

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS: tuple[WeightFormat, ...] = ("full", "fp8", "int8")
SHAPES = [(7, 5), (1, 1), (3, 1), (4, 6, 3, 3), (5, 2, 1, 1)]


def weights(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Rows of different magnitude; the first is zero."""
    torch.manual_seed(0)
    weight = torch.randn(shape) * 2.0 ** -torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1))
    weight[0] = 0
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_within_half_a_step(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = weights(shape, dtype)
    values, scale = quantised(weight, "int8")
    assert values.dtype == torch.int8 and values.shape == weight.shape
    assert scale.dtype == dtype and scale.shape == (shape[0], *[1] * (len(shape) - 1))
    errors = (values.double() * scale.double() - weight.double()).abs()
    assert (errors <= scale.double() / 2 * (1 + 1e-6)).all()
    assert (values[0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_is_within_half_a_step(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """3 bits of mantissa: 1/16 of a value, or half of the smallest step, 2^-9, of small ones."""
    weight = weights(shape, dtype)
    values, scale = quantised(weight, "fp8")
    assert values.dtype == torch.float8_e4m3fn
    errors = (values.double() * scale.double() - weight.double()).abs()
    bound = torch.maximum(weight.double().abs() / 16, scale.double() / 2**10)
    assert (errors <= bound * (1 + 1e-6)).all()
    assert (values[0].float() == 0).all()


def test_rounding_the_scale_changes_no_magnitude() -> None:
    """A row's error has no part along the row: values relative to the unrounded scale would have up to 2^-9."""
    torch.manual_seed(0)
    weight = torch.randn(16, 4096).bfloat16()
    values, scale = quantised(weight, "int8")
    product = values.double() * scale.double()
    along = (product * weight.double()).sum(1) / weight.double().square().sum(1) - 1
    assert along.abs().max() < 5e-4


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_rows_too_small_for_a_scale_in_fp16_are_zero(form: Literal["int8", "fp8"]) -> None:
    weight = torch.full((2, 3), 6e-8).half()
    values, scale = quantised(weight, form)
    assert (scale == 1).all() and (values.float() == 0).all()


# Layers


LAYERS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "linear": (lambda **to: nn.Linear(6, 10, **to), (2, 5, 6)),
    "linear, 2-d, no bias": (lambda **to: nn.Linear(6, 9, bias=False, **to), (4, 6)),
    "3 x 3": (lambda **to: nn.Conv2d(4, 6, 3, padding=1, **to), (2, 4, 7, 9)),
    "strided": (lambda **to: nn.Conv2d(4, 6, 3, stride=2, padding=1, **to), (2, 4, 8, 7)),
    "1 x 1, no bias": (lambda **to: nn.Conv2d(4, 6, 1, bias=False, **to), (2, 4, 5, 5)),
    "grouped and dilated": (lambda **to: nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2, **to), (1, 4, 9, 9)),
}


def example(name: str, dtype: torch.dtype) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    return make(dtype=dtype).requires_grad_(False), torch.randn(shape).to(dtype)


def stored(layer: Any, form: WeightFormat, waits: bool) -> StoredLayer:
    kind: Any = StoredLinear if isinstance(layer, nn.Linear) else StoredConv2d
    result: StoredLayer = kind(layer, form, CPU)
    if waits:
        blocks = OffloadedBlocks(CPU)
        blocks.add([torch.zeros(1)])
        tensors = list(result.stored().values())
        result.wait_in(blocks, blocks.add([torch.zeros(3), *tensors]), 1)
        assert not result.stored()
    return result


def results(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    output = layer(x)
    torch.manual_seed(1)
    output.backward(torch.randn(output.shape).to(output.dtype))
    assert x.grad is not None
    return output.detach(), x.grad


@pytest.mark.parametrize("waits", [False, True], ids=["resident", "offloaded"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_equals_a_plain_layer_with_the_same_weight(
    name: str, dtype: torch.dtype, form: WeightFormat, waits: bool
) -> None:
    plain, x = example(name, dtype)
    layer = stored(plain, form, waits)
    assert (dense(layer) == plain.weight).all() == (form == "full")
    plain.weight.copy_(dense(layer))
    for found, wanted in zip(results(layer, x), results(plain, x), strict=True):
        assert torch.equal(found, wanted)
        assert found.stride() == wanted.stride()


@pytest.mark.parametrize("name", ["3 x 3", "1 x 1, no bias"])
def test_equals_a_plain_layer_in_channels_last(name: str) -> None:
    plain, x = example(name, torch.float32)
    x = x.to(memory_format=torch.channels_last)
    for found, wanted in zip(results(stored(plain, "full", True), x), results(plain, x), strict=True):
        assert torch.equal(found, wanted)


def test_an_input_with_its_axes_exchanged() -> None:
    """As proj_in of a transformer reads one image."""
    plain, _ = example("linear", torch.float32)
    x = torch.randn(1, 6, 35).permute(0, 2, 1)
    for found, wanted in zip(results(stored(plain, "full", False), x), results(plain, x), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LAYERS)
def test_nothing_is_saved_for_the_backward_pass(name: str, form: WeightFormat) -> None:
    plain, x = example(name, torch.float32)
    layer, saved = stored(plain, form, True), []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: torch.empty(0)):
        output = layer(x.requires_grad_())
    assert output.requires_grad and not saved
    assert not layer(x.detach()).requires_grad


def test_the_plain_layers_own_tensors() -> None:
    plain, _ = example("linear", torch.float32)
    assert dense(plain) is plain.weight and bias_of(plain) is plain.bias
    layer = stored(plain, "full", True)
    bias = bias_of(layer)
    assert bias is not None and torch.equal(bias, plain.bias)
    assert torch.equal(layer.weight, plain.weight)


# Blocks of a UNet


def with_lora(base: SDXLBase, form: WeightFormat, offloaded: int) -> tuple[Any, FlatParameters, OffloadedBlocks | None]:
    unet: Any = load_part(base, "unet", torch.float32)
    adapter = Adapter(unet, TrainConfig(rank=2))
    torch.manual_seed(0)
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    blocks = store_weights(unet, form, offloaded, CPU)
    flat = FlatParameters(adapter.groups, adapter.scales, torch.float32)
    adapter.fuse(flat)
    return unet, flat, blocks


def forward(unet: Any) -> Tensor:
    torch.manual_seed(1)
    added = {"text_embeds": torch.randn(2, 16), "time_ids": torch.ones(2, 6)}
    return unet(
        torch.randn(2, 4, 16, 16),
        torch.tensor([3, 500]),
        encoder_hidden_states=torch.randn(2, 7, 20),
        added_cond_kwargs=added,
    ).sample


def step(unet: Any, flat: FlatParameters) -> list[Tensor]:
    """The prediction and the gradients of the LoRA."""
    flat.clear_gradients()
    prediction = forward(unet)
    prediction.square().sum().backward()
    flat.collect()
    return [prediction.detach(), flat.gradients.clone()]


@pytest.fixture(scope="module")
def exact(micro_base: SDXLBase) -> list[Tensor]:
    """What `step` returns for plain layers."""
    return step(*with_lora(micro_base, "full", 0)[:2])


@pytest.fixture(scope="module")
def unet(micro_base: SDXLBase) -> Any:
    """Not to be changed."""
    return load_part(micro_base, "unet", torch.float32)


def test_the_blocks_are_in_the_order_of_the_forward_pass(unet: Any) -> None:
    kinds = ("BasicTransformerBlock", "ResnetBlock2D", "Downsample2D", "Upsample2D")
    ran: list[nn.Module] = []
    handles = [
        module.register_forward_pre_hook(lambda module, _: ran.append(module))
        for module in unet.modules()
        if type(module).__name__ in kinds
    ]
    with torch.no_grad():
        forward(unet)
    for handle in handles:
        handle.remove()
    assert weight_blocks(unet) == ran
    assert len(set(ran)) == len(ran) == len(handles)


def test_the_number_of_blocks_of_sdxl(empty_sdxl: dict[str, Any]) -> None:
    assert len(weight_blocks(empty_sdxl["unet"])) == 70 + 17 + 2 + 2


def test_offloaded_blocks_are_spread_evenly() -> None:
    assert spread(0, 7) == [] and spread(7, 7) == spread(1000, 7) == [0, 1, 2, 3, 4, 5, 6]
    assert spread(1, 7) == [3] and spread(2, 8) == [2, 6]
    for count in range(1, 92):
        chosen = spread(count, 91)
        assert chosen == sorted(set(chosen)) and len(chosen) == count and chosen[0] >= 0 and chosen[-1] < 91
        assert len({after - before for before, after in zip(chosen, chosen[1:], strict=False)}) <= 2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("offloaded", [1, 6, 1000])
def test_a_step_with_offloaded_blocks_is_the_same(
    micro_base: SDXLBase, exact: list[Tensor], offloaded: int, checkpointing: bool
) -> None:
    unet, flat, blocks = with_lora(micro_base, "full", offloaded)
    assert blocks
    if checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    assert all(map(torch.equal, step(unet, flat), exact))
    blocks.evict()
    assert all(map(torch.equal, step(unet, flat), exact))


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_a_step_with_quantised_weights(micro_base: SDXLBase, exact: list[Tensor], form: WeightFormat) -> None:
    """It is that of the rounded weights, however they are kept, and near to that of the weights."""
    unet, flat, _ = with_lora(micro_base, form, 0)
    found = step(unet, flat)
    assert all(map(torch.equal, step(*with_lora(micro_base, form, 1000)[:2]), found))
    plain, plain_flat, _ = with_lora(micro_base, "full", 0)
    for name, layer in unet.named_modules():
        if isinstance(layer, StoredLayer):
            plain.get_submodule(name).weight.data.copy_(dense(layer))
    for ours, rounded, truth in zip(found, step(plain, plain_flat), exact, strict=True):
        torch.testing.assert_close(ours, rounded, rtol=1e-5, atol=1e-6)
        assert 0 < (ours - truth).norm() / truth.norm() < (0.25 if form == "fp8" else 0.05)


def test_which_layers_are_replaced(micro_base: SDXLBase) -> None:
    unet, _, _ = with_lora(micro_base, "int8", 3)
    kept = {name for name, layer in unet.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    frozen = {name for name in kept if ".lora_" not in name}
    time = {f"{part}.linear_{n}" for part in ("time_embedding", "add_embedding") for n in (1, 2)}
    assert frozen == {"conv_in", "conv_out", *time}
    assert kept - frozen  # factors of LoRA
    assert isinstance(unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.base_layer, StoredLinear)
    assert isinstance(unet.mid_block.attentions[0].proj_in, StoredLinear)

    unet, _, blocks = with_lora(micro_base, "full", 3)
    assert blocks and len(blocks.block_bytes) == 3
    chosen = [weight_blocks(unet)[index] for index in spread(3, len(weight_blocks(unet)))]
    inside = {module for block in chosen for module in block.modules() if isinstance(module, StoredLayer)}
    stored = {module for module in unet.modules() if isinstance(module, StoredLayer)}
    assert inside < stored and all(isinstance(module, StoredConv2d) for module in stored - inside)


def test_only_convolutions_are_replaced_where_nothing_is_saved_in_the_weights(micro_base: SDXLBase) -> None:
    """Theirs save no input for the backward pass."""
    unet, _, blocks = with_lora(micro_base, "full", 0)
    stored = [module for module in unet.modules() if isinstance(module, StoredLayer)]
    assert blocks is None and stored and all(isinstance(module, StoredConv2d) for module in stored)


def test_trained_layers_are_not_replaced(micro_base: SDXLBase) -> None:
    unet: Any = load_part(micro_base, "unet", torch.float32)
    trained = unet.mid_block.resnets[0].conv1.requires_grad_(True)
    store_weights(unet, "int8", 1000, CPU)
    assert unet.mid_block.resnets[0].conv1 is trained
    assert isinstance(unet.mid_block.resnets[0].conv2, StoredConv2d)


def test_the_original_weights_are_freed(micro_base: SDXLBase) -> None:
    unet: Any = load_part(micro_base, "unet", torch.float32)
    layers = [layer for block in weight_blocks(unet) for layer in block.modules() if isinstance(layer, nn.Linear)]
    originals = [weakref.ref(layer.weight) for layer in layers]
    del layers
    store_weights(unet, "full", 1000, CPU)
    assert originals and not any(original() is not None for original in originals)


def test_copies_of_layers_keep_their_weight() -> None:
    plain, x = example("linear", torch.float32)
    layer = stored(plain, "int8", True)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.fixture(scope="module")
def adapted(micro_base: SDXLBase) -> Any:
    """A UNet in bf16 with a LoRA, not to be changed."""
    unet: Any = load_part(micro_base, "unet", torch.bfloat16)
    Adapter(unet, TrainConfig(rank=2))
    return unet


@pytest.mark.parametrize("offloaded", [0, 1, 5, 1000])
@pytest.mark.parametrize("form", FORMS)
def test_the_planned_bytes_are_those_of_the_stored_weights(adapted: Any, form: WeightFormat, offloaded: int) -> None:
    unet = copy.deepcopy(adapted)
    planned = stored_bytes(copy.deepcopy(unet).to("meta"), form, offloaded)
    blocks = store_weights(unet, form, offloaded, CPU)
    frozen = [weight for weight in unet.parameters() if not weight.requires_grad]
    assert planned.resident == sum(tensor.nbytes for tensor in (*frozen, *unet.buffers()))
    layers = [layer for layer in unet.modules() if isinstance(layer, StoredLayer)]
    made = max(dense(layer).nbytes for layer in layers) if form != "full" else 0
    assert planned.window == (blocks.window_bytes if blocks else 0) + made


def test_the_bytes_of_sdxl(empty_sdxl: dict[str, Any]) -> None:
    """2.57e9 weights: 10.3 GB in fp32, of which little is left on the device with all blocks offloaded."""
    unet = empty_sdxl["unet"].requires_grad_(False)
    assert stored_bytes(unet, "full", 0) == (4 * 2_567_463_684, 0)
    resident, window = stored_bytes(unet, "full", 1000)
    assert resident / 4 < 60e6 and window / 4 < 90e6
    assert stored_bytes(unet, "int8", 0).resident < 0.27 * 4 * 2_567_463_684
