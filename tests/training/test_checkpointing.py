"""What the UNet keeps for the backward pass: all modes and the gated GELU give the gradients of torch's operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from sdxl_lora_core.sdxl.base import SDXLBase, load_part
from sdxl_lora_core.training.config.memory import Checkpointing
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.model.adapters import Adapter
from sdxl_lora_core.training.model.checkpointing import GatedGELU, set_checkpointing
from sdxl_lora_core.training.optim.memory_count import StorageCount

MODES: tuple[Checkpointing, ...] = ("off", "selective", "on")


def by_torch(projected: Tensor) -> Tensor:
    value, gate = projected.chunk(2, dim=-1)
    return value * gelu(gate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gated_gelu_is_torchs_bit_for_bit(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    projected = 3 * torch.randn(2, 5, 48, generator=random)
    grad = torch.randn(5, 2, 24, generator=random).transpose(0, 1).to(dtype)  # not contiguous
    found = []
    for function in (by_torch, GatedGELU.apply):
        x = projected.to(dtype).requires_grad_()
        result = function(x)
        result.backward(grad)
        found.append((result.detach(), x.grad))
    (expected, of_expected), (result, of_result) = found
    assert torch.equal(result, expected)
    assert torch.equal(of_result, of_expected)


def test_the_gated_gelu_keeps_nothing_besides_its_input() -> None:
    projected = torch.randn(4, 64, requires_grad=True)
    with StorageCount() as count:
        kept = GatedGELU.apply(projected)
        assert count.allocated == kept.nbytes  # torch's operations keep gelu(gate) as well
        del kept
    assert count.allocated == 0


def of_unet(unet: Any) -> list[Tensor]:
    """The gradients of the adapter."""
    result = unet(
        torch.ones(1, 4, 16, 16),
        torch.tensor([500]),
        encoder_hidden_states=torch.ones(1, 77, 20),
        added_cond_kwargs={"text_embeds": torch.ones(1, 16), "time_ids": torch.ones(1, 6)},
    ).sample
    result.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in unet.parameters() if parameter.grad is not None]
    unet.zero_grad()
    return gradients


def test_each_mode_gives_the_gradients_of_the_unet_as_it_is(micro_base: SDXLBase) -> None:
    unet: Any = load_part(micro_base, "unet", torch.float32)
    Adapter(unet, TrainConfig(rank=2))
    unet.train()
    expected = of_unet(unet)
    assert any(gradient.any() for gradient in expected)
    for mode in (*MODES, "off"):
        set_checkpointing(unet, mode)
        for gradient, wanted in zip(of_unet(unet), expected, strict=True):
            assert torch.equal(gradient, wanted)
