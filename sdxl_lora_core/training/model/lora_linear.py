"""LoRA on frozen linear layers as one autograd function.

peft computes the branch in fp32 beside a base in bf16, with casts and sums of the size of the activations. Here the
branch is added to the base's output in place, in the base's number format. Layers that read the same input, as the
projections to q, k and v do, share the product with their down matrices.

The factors and their gradients are views of FlatParameters: the backward pass adds to the gradients of the pass itself,
so that no parameter has a gradient of its own to be cast, scaled or accumulated.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, scaled_dot_product_attention

from .base_weights import bias_of, dense
from .flat_parameters import FlatParameters


class LoRAStack:
    """LoRAs on layers that read the same input. `layers` are peft's, whose scale is folded into the up matrices."""

    def __init__(self, layers: Sequence[Any], flat: FlatParameters) -> None:
        self.bases: list[nn.Module] = [layer.base_layer for layer in layers]
        self._downs = [layer.lora_A["default"].weight for layer in layers]
        self._ups = [layer.lora_B["default"].weight for layer in layers]
        self.ranks = [len(down) for down in self._downs]
        flat.with_views(self._take_views)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        return FusedLoRA.apply(x, self._downs[0], self)

    def _take_views(self, flat: FlatParameters) -> None:
        """Views of the flat buffers.

        `down` and `of_down` are the down matrices, [sum of ranks, in], and their gradient; `ups` and `of_ups` the
        scaled up matrices, each [out, rank], and theirs.
        """
        self.down, self.of_down = flat.low_rows(self._downs), flat.pass_rows(self._downs)
        self.ups = [flat.low_rows([up]) for up in self._ups]
        self.of_ups = [flat.pass_rows([up]) for up in self._ups]


class FusedLoRA(torch.autograd.Function):
    """x W^T + b + (x A^T) (scale * B)^T (Hu et al., arXiv 2106.09685, eq. 3) for each layer of a stack, x [..., in].

    W and b are frozen. `trained` is any parameter of the stack: because of it the outputs require a gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, trained: Tensor, stack: LoRAStack) -> tuple[Tensor, ...]:  # type: ignore[override]
        rows = x.flatten(0, -2)
        hidden = rows @ stack.down.t()
        outputs = []
        for base, up, part in zip(stack.bases, stack.ups, hidden.split(stack.ranks, dim=1), strict=True):
            result = linear(rows, dense(base), bias_of(base)).addmm_(part, up.t())
            outputs.append(result.view(*x.shape[:-1], -1))
        ctx.save_for_backward(rows, hidden)
        ctx.stack, ctx.shape = stack, x.shape
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, hidden = ctx.saved_tensors
        stack: LoRAStack = ctx.stack
        of_outputs = [grad.flatten(0, -2) for grad in grads]
        of_hidden = _into_hidden(of_outputs, stack.ups)
        for of_up, of_output, part in zip(stack.of_ups, of_outputs, hidden.split(stack.ranks, dim=1), strict=True):
            _add_product(of_up, of_output.t(), part)
        _add_product(stack.of_down, of_hidden.t(), rows)
        if not ctx.needs_input_grad[0]:
            return None, None, None
        of_rows = of_outputs[0] @ dense(stack.bases[0])
        for of_output, base in zip(of_outputs[1:], stack.bases[1:], strict=True):
            of_rows.addmm_(of_output, dense(base))
        return of_rows.addmm_(of_hidden, stack.down).view(ctx.shape), None, None


def _into_hidden(of_outputs: Sequence[Tensor], ups: Sequence[Tensor]) -> Tensor:
    """The gradient of the hidden values, [rows, sum of ranks], from those of each layer's output."""
    parts = [of_output @ up for of_output, up in zip(of_outputs, ups, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    """total += one @ other. Before macOS 15, MPS writes no product into a part of a buffer (pytorch pull 193385)."""
    if total.device.type == "mps":
        total.add_(one @ other)
    else:
        total.addmm_(one, other)


class StackedAttention:
    """diffusers' attention processor for the attention of SDXL's transformer blocks, whose LoRAs are fused.

    There are no masks, no norms and no residual within it. In self-attention q, k and v share a stack; in
    cross-attention k and v do, which read the prompt.
    """

    def __init__(self, attention: Any, flat: FlatParameters) -> None:
        q, k, v = attention.to_q, attention.to_k, attention.to_v
        stacks = [[q], [k, v]] if attention.is_cross_attention else [[q, k, v]]
        self.stacks = [LoRAStack(layers, flat) for layers in stacks]

    def __call__(
        self, attention: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        inputs = [hidden_states] if encoder_hidden_states is None else [hidden_states, encoder_hidden_states]
        projected = [result for stack, x in zip(self.stacks, inputs, strict=True) for result in stack(x)]
        query, key, value = (_by_head(result, attention.heads) for result in projected)
        attended = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return attention.to_out[1](attention.to_out[0](attended))


def _by_head(x: Tensor, heads: int) -> Tensor:
    """[B, tokens, heads * width] as [B, heads, tokens, width]."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def fused_scales(layers: Iterable[Any]) -> dict[nn.Parameter, float]:
    """The factors of the layers that `fuse` replaces, with the scale that the forward pass applies to each."""
    scales: dict[nn.Parameter, float] = {}
    for layer in filter(_can_be_fused, layers):
        scales[layer.lora_A["default"].weight] = 1.0
        scales[layer.lora_B["default"].weight] = layer.scaling["default"]
    return scales


def fuse(model: Any, layers: Iterable[Any], flat: FlatParameters) -> None:
    """Replaces the forward of peft's LoRA layers on linear layers, and the attention of SDXL's transformer blocks."""
    fused = {layer for layer in layers if _can_be_fused(layer)}
    for layer in fused:
        layer.forward = functools.partial(_forward, LoRAStack([layer], flat))
    for module in model.modules():
        if _is_plain_attention(module) and fused.issuperset((module.to_q, module.to_k, module.to_v)):
            own = [] if module.is_cross_attention else [module.to_q]
            stacked: list[Any] = [*own, module.to_k, module.to_v]
            if flat.are_adjacent([layer.lora_A["default"].weight for layer in stacked]):
                module.set_processor(StackedAttention(module, flat))


def _forward(stack: LoRAStack, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return stack(x)[0]


def _can_be_fused(layer: Any) -> bool:
    from peft.tuners.lora import Linear

    return isinstance(layer, Linear) and "default" not in layer.lora_variant


def _is_plain_attention(module: Any) -> bool:
    """Whether diffusers' attention has none of the parts that StackedAttention leaves out."""
    from diffusers.models.attention_processor import Attention

    if not isinstance(module, Attention):
        return False
    absent = (module.spatial_norm, module.group_norm, module.norm_q, module.norm_k, module.norm_cross)
    return not any(absent) and not module.residual_connection and module.rescale_output_factor == 1
