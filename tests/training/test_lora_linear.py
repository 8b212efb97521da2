"""The fused LoRA layers against peft's own, and the buffers that hold their factors."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from sdxl_lora_core.sdxl.base import SDXLBase, load_part
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.model.adapters import Adapter
from sdxl_lora_core.training.model.flat_parameters import FlatParameters, ParameterGroup
from sdxl_lora_core.training.model.lora_linear import LoRAStack, fuse, fused_scales

WIDTHS = {"q": 10, "k": 6, "v": 8}


def lora_layers(dtype: torch.dtype) -> nn.ModuleDict:
    """peft's LoRAs of rank 2 and scale 3 on layers that read 6 values."""
    torch.manual_seed(0)
    layers = nn.ModuleDict({name: nn.Linear(6, width, dtype=dtype) for name, width in WIDTHS.items()})
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=6, target_modules=list(WIDTHS)), layers)
    for layer in layers.values():
        for parameter in factors(layer):
            parameter.data = torch.randn(parameter.shape)
    return layers


def factors(layer: Any) -> list[nn.Parameter]:
    return [layer.lora_A["default"].weight, layer.lora_B["default"].weight]


def flat_of(layers: Sequence[Any], dtype: torch.dtype) -> FlatParameters:
    """All down matrices come first, as in an adapter."""
    downs, ups = zip(*map(factors, layers), strict=True)
    return FlatParameters([ParameterGroup([*downs, *ups])], fused_scales(layers), dtype)


def by_peft(layers: nn.ModuleDict, x: Tensor) -> list[Tensor]:
    """The outputs, and the gradients of the input and of all matrices."""
    x = x.clone().requires_grad_()
    outputs = [layer(x) for layer in layers.values()]
    sum(output.float().square().sum() for output in outputs).backward()
    return [*outputs, x.grad, *(parameter.grad for layer in layers.values() for parameter in factors(layer))]


def fused(layers: nn.ModuleDict, x: Tensor) -> list[Tensor]:
    flat = flat_of([*layers.values()], x.dtype)
    x = x.clone().requires_grad_()
    outputs = LoRAStack([*layers.values()], flat)(x)
    sum(output.float().square().sum() for output in outputs).backward()
    flat.collect()
    return [*outputs, x.grad, *(parameter.grad for layer in layers.values() for parameter in factors(layer))]


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6)])
def test_a_stack_equals_pefts_layers_in_fp32(shape: tuple[int, ...]) -> None:
    layers, x = lora_layers(torch.float32), torch.randn(shape)
    for theirs, ours in zip(by_peft(copy.deepcopy(layers), x), fused(layers, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_it_is_as_near_to_the_truth_as_bf16_allows() -> None:
    layers, x = lora_layers(torch.bfloat16), torch.randn(64, 6).bfloat16()
    exact = copy.deepcopy(layers).float()
    for ours, truth in zip(fused(layers, x), by_peft(exact, x.float()), strict=True):
        assert (ours.float() - truth).norm() / truth.norm() < 0.02
    assert factors(layers["q"])[0].grad.dtype == torch.float32


def test_gradients_add_up_over_passes_until_they_are_cleared() -> None:
    layers, x = lora_layers(torch.float32), torch.randn(3, 6)
    flat = flat_of([*layers.values()], torch.float32)
    stack = LoRAStack([*layers.values()], flat)
    once: list[Tensor] = []
    for _ in range(2):
        stack(x)[0].sum().backward()
        flat.collect()
        once = once or [flat.gradients.clone()]
    torch.testing.assert_close(flat.gradients, 2 * once[0])
    flat.clear_gradients()
    assert not flat.gradients.any() and not flat.pass_gradients.any()


def test_a_changed_value_is_in_the_next_pass() -> None:
    layers, x = lora_layers(torch.float32), torch.randn(3, 6)
    flat = flat_of([*layers.values()], torch.float32)
    stack = LoRAStack([*layers.values()], flat)
    flat.assign(torch.zeros_like(flat.values))
    torch.testing.assert_close(stack(x)[0], layers["q"].base_layer(x))
    assert not factors(layers["q"])[0].any()


def test_parameters_stay_views_when_the_buffers_move() -> None:
    layers, x = lora_layers(torch.float32), torch.randn(3, 6)
    flat = flat_of([*layers.values()], torch.float32)
    stack = LoRAStack([*layers.values()], flat)
    base = nn.functional.linear(x, layers["q"].base_layer.weight.detach(), layers["q"].base_layer.bias.detach())
    before = stack(x)[0] - base
    layers.double().float()  # modules move each parameter on its own
    flat.to(torch.device("cpu"))
    flat.whole.data.mul_(2)
    flat.refresh()
    assert factors(layers["q"])[0].data_ptr() == flat.values.data_ptr()
    torch.testing.assert_close(stack(x)[0] - base, 4 * before, rtol=1e-5, atol=1e-5)  # both factors are doubled


def test_each_rate_has_a_flat_parameter_with_its_own_gradient() -> None:
    first, second = (nn.Parameter(torch.full((2, 2), float(value))) for value in (1, 2))
    flat = FlatParameters([ParameterGroup([first]), ParameterGroup([second], 0.5)], {}, torch.float32)
    second.sum().backward()
    one, other = flat.groups_for(elementwise=True)
    assert (one.rate_factor, other.rate_factor) == (1.0, 0.5)
    assert one.parameters[0].tolist() == [1.0] * 4 and other.parameters[0].grad.tolist() == [1.0] * 4
    assert flat.whole.grad.tolist() == [0.0] * 4 + [1.0] * 4
    assert [group.parameters for group in flat.groups_for(elementwise=False)] == [[first], [second]]


def loss_of(unet: Any, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    prediction = unet(
        torch.randn(2, 4, 16, 16).to(dtype),
        torch.tensor([500, 20]),
        encoder_hidden_states=torch.randn(2, 77, 20).to(dtype),
        added_cond_kwargs={"text_embeds": torch.randn(2, 16).to(dtype), "time_ids": torch.ones(2, 6)},
    ).sample
    return prediction.square().mean()


@pytest.mark.parametrize(
    "settings", [{}, {"target_modules": "all-linear+conv"}, {"lora_plus_ratio": 4.0}, {"block_ranks": "mid_block=3"}]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-5)])
def test_the_gradients_of_a_whole_unet_are_pefts(
    micro_base: SDXLBase, settings: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    """In float64, where rounding hides nothing, and in float32. With checkpointing, too."""
    found: list[dict[str, Tensor]] = []
    for is_fused, checkpointing in ((False, False), (True, False), (True, True)):
        unet: Any = load_part(micro_base, "unet", dtype)
        adapter = Adapter(unet, TrainConfig(rank=2, alpha=4.0, **settings))
        generator = torch.Generator().manual_seed(1)
        for layer in adapter.layers.values():
            layer.lora_B["default"].weight.data.normal_(0, 0.1, generator=generator)
        for parameter in (parameter for group in adapter.groups for parameter in group.parameters):
            parameter.data = parameter.data.to(dtype)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet.train()
        flat = FlatParameters(adapter.groups, adapter.scales, dtype)
        if is_fused:
            adapter.fuse(flat)
        loss_of(unet, dtype).backward()
        flat.collect()
        found.append({name: p.grad.clone() for name, p in unet.named_parameters() if p.requires_grad})
    theirs, *fused_ones = found
    for name, gradient in theirs.items():
        assert gradient.norm() > 0, name
        for ours in fused_ones:
            assert (ours[name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "is_fused"), [({}, True), ({"dropout": 0.1}, False), ({"adapter": "dora"}, False)]
)
def test_dora_and_dropout_stay_with_peft(micro_base: SDXLBase, settings: dict[str, Any], is_fused: bool) -> None:
    unet: Any = load_part(micro_base, "unet", torch.float32)
    adapter = Adapter(unet, TrainConfig(rank=2, **settings))
    adapter.fuse(FlatParameters(adapter.groups, adapter.scales, torch.float32))
    assert all(("forward" in vars(layer)) == is_fused for layer in adapter.layers.values())
    stacked = [type(processor).__name__ == "StackedAttention" for processor in unet.attn_processors.values()]
    assert all(stacked) if is_fused else not any(stacked)


def test_an_attention_whose_projections_are_not_all_adapted_is_left_alone(micro_base: SDXLBase) -> None:
    unet: Any = load_part(micro_base, "unet", torch.float32)
    adapter = Adapter(unet, TrainConfig(rank=2))
    some = [layer for name, layer in adapter.layers.items() if not name.endswith("to_k")]
    fuse(unet, some, FlatParameters(adapter.groups, adapter.scales, torch.float32))
    assert not any(type(processor).__name__ == "StackedAttention" for processor in unet.attn_processors.values())
