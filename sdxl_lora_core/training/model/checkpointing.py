"""What the UNet keeps for the backward pass, and what it computes again there.

The largest part are the activations of the feed-forward layers (GEGLU, Shazeer, arXiv 2002.05202). Torch's own
operations keep three tensors of their inner size. Two are enough, because the third is quick to compute again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu

from ..config.memory import Checkpointing

_GEGLU = "GEGLU"


def set_checkpointing(unet: Any, mode: Checkpointing) -> None:
    """off: keeps all that is slow to compute. selective: recomputes the feed-forward layers. on: every block."""
    unet.disable_gradient_checkpointing()
    for module in unet.modules():
        if type(module).__name__ == _GEGLU:
            own = module.proj.weight.device.type == "mps"  # whose kernels may not write into a part of a buffer
            forward = functools.partial(type(module).forward if own else _geglu, module)
            module.forward = functools.partial(_recomputed, forward) if mode == "selective" else forward
    if mode == "on":
        unet.enable_gradient_checkpointing()


def _geglu(module: Any, x: Tensor) -> Tensor:
    """The forward of diffusers' GEGLU."""
    return GatedGELU.apply(module.proj(x))


class GatedGELU(torch.autograd.Function):
    """value * gelu(gate), [..., N], of projected [..., 2 N], which holds the two side by side.

    Only `projected` is kept, and gelu(gate) is computed again. Results and gradients are those of torch's own
    operations bit for bit.
    """

    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(projected)
        value, gate = projected.chunk(2, dim=-1)
        return value * gelu(gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (projected,) = ctx.saved_tensors
        value, gate = projected.chunk(2, dim=-1)
        result = torch.empty_like(projected)
        of_value, of_gate = result.chunk(2, dim=-1)
        torch.mul(grad, gelu(gate), out=of_value)
        torch.ops.aten.gelu_backward.grad_input(grad * value, gate, grad_input=of_gate)
        return result


def _recomputed(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
