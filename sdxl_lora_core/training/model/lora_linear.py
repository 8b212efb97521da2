"""LoRA on a frozen linear layer as one autograd function.

peft computes the branch in fp32 beside a base in bf16, with copies and sums of the size of the activations. Here it is
added to the base's output in place, in the base's dtype; the parameters and their gradients stay float32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


class LoRALinear(torch.autograd.Function):
    """x W^T + b + scale * (x A^T) B^T (Hu et al., arXiv 2106.09685, eq. 3) for x [..., in]; W and b are frozen."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        rows = x.flatten(0, -2)
        low_down, low_up = down.to(x.dtype), (up * scale).to(x.dtype)
        hidden = rows @ low_down.t()
        result = linear(rows, weight, bias).addmm_(hidden, low_up.t())
        ctx.save_for_backward(rows, hidden, weight, low_down, low_up)
        ctx.scale = scale
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, hidden, weight, low_down, low_up = ctx.saved_tensors
        grad_rows = grad.flatten(0, -2)
        grad_hidden = grad_rows @ low_up
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_rows @ weight).addmm_(grad_hidden, low_down).view(*grad.shape[:-1], -1)
        grad_down = (grad_hidden.t() @ rows).float()
        grad_up = (grad_rows.t() @ hidden).float() * ctx.scale
        return grad_x, None, None, grad_down, grad_up, None


def fuse(layers: Iterable[nn.Module]) -> None:
    """Replaces the forward of peft's LoRA layers on linear layers by LoRALinear. Their parameters are unchanged."""
    from peft.tuners.lora import Linear

    for layer in layers:
        if isinstance(layer, Linear) and "default" not in layer.lora_variant:
            layer.forward = functools.partial(_forward, layer, layer.forward)  # type: ignore[method-assign]


def _forward(layer: Any, by_peft: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if layer.disable_adapters or layer.merged or args or kwargs:
        return by_peft(x, *args, **kwargs)
    base, down, up = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return LoRALinear.apply(x, base.weight, base.bias, down, up, layer.scaling["default"])
