"""The fused LoRA layer against peft's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from sdxl_lora_core.sdxl.base import SDXLBase, load_part
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.model.adapters import Adapter
from sdxl_lora_core.training.model.lora_linear import LoRALinear, fuse


def lora_layer(dtype: torch.dtype, **settings: Any) -> Any:
    torch.manual_seed(0)
    holder = nn.ModuleDict({"layer": nn.Linear(6, 10, dtype=dtype)})
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=6, target_modules=["layer"], **settings), holder)
    layer: Any = holder["layer"]
    for parameter in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
        parameter.data = torch.randn(parameter.shape)
    return layer


def results(layer: Any, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of both matrices."""
    x = x.clone().requires_grad_()
    out = layer(x)
    out.float().square().sum().backward()
    found = [out, x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]
    assert all(tensor is not None for tensor in found)
    return [tensor.detach() for tensor in found if tensor is not None]


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6)])
def test_equals_peft_in_fp32(shape: tuple[int, ...]) -> None:
    layer, x = lora_layer(torch.float32), torch.randn(shape)
    fused = copy.deepcopy(layer)
    fuse([fused])
    for ours, theirs in zip(results(fused, x), results(layer, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_is_as_near_to_the_truth_as_bf16_allows() -> None:
    layer, x = lora_layer(torch.bfloat16), torch.randn(64, 6).bfloat16()
    exact = copy.deepcopy(layer).float()
    fuse([layer])
    for ours, truth in zip(results(layer, x), results(exact, x.float()), strict=True):
        error = (ours.float() - truth).norm() / truth.norm()
        assert error < 0.02
    assert layer.lora_A["default"].weight.grad.dtype == torch.float32


def test_gradients_match_finite_differences() -> None:
    draw = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), (2, 4), (5, 2))]
    weight, bias = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)

    def call(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return LoRALinear.apply(x, weight, bias, down, up, 1.5)

    # The matrices' gradients are rounded to float32.
    assert torch.autograd.gradcheck(call, draw, eps=1e-4, atol=1e-4)


@pytest.mark.slow
def test_dora_and_dropout_stay_with_peft(micro_base: SDXLBase) -> None:
    for settings, fused in (({}, True), ({"dropout": 0.1}, False), ({"adapter": "dora"}, False)):
        unet: Any = load_part(micro_base, "unet", torch.float32)
        adapter = Adapter(unet, TrainConfig(rank=2, **settings))
        assert all(("forward" in vars(layer)) == fused for layer in adapter.layers.values())


def test_a_switched_off_adapter_is_the_base(micro_base: SDXLBase) -> None:
    layer, x = lora_layer(torch.float32), torch.randn(3, 6)
    fuse([layer])
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x), layer.base_layer(x))
