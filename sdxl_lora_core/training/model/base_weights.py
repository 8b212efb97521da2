"""The UNet's frozen weights in less memory: quantised to 8 bits, in main memory until they are needed, or both.

Such a layer makes its weight again for each use, so that an autograd graph never holds one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, linear

from ...runtime.offload import OffloadedBlocks, largest_window, packed_bytes
from ..config.memory import BaseWeights, WeightFormat

_LARGEST = {"int8": 127.0, "fp8": 448.0}  # of fp8 with 4 bits of exponent and 3 of mantissa, arXiv 2209.05433
_STORED = ("values", "scale", "shift")
_LAYERS = (nn.Linear, nn.Conv2d)


def require_format(form: BaseWeights, device: torch.device) -> None:
    """Raises ValueError if the device has no numbers of this format, as MPS has no fp8."""
    if form != "fp8":
        return
    try:
        torch.zeros(1, device=device).to(torch.float8_e4m3fn).float()
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"base_weights is 'fp8', which {device.type} does not support: choose int8") from error


@torch.no_grad()
def quantised(weight: Tensor, form: Literal["fp8", "int8"]) -> tuple[Tensor, Tensor]:
    """The weight as 8-bit values and a scale for each row (index of dimension 0), whose product is nearest to it.

    values [out, in, ...]; scale [out, 1, ...] in the weight's dtype. The values are relative to the rounded scale, so
    that rounding it changes no row's magnitude.
    """
    largest = weight.abs().amax(dim=tuple(range(1, weight.dim())), keepdim=True).float()
    scale = (largest / _LARGEST[form]).to(weight.dtype)
    scale.masked_fill_(scale == 0, 1)
    relative = weight.float() / scale
    if form == "int8":
        relative.round_()
    relative.clamp_(-_LARGEST[form], _LARGEST[form])
    return relative.to(torch.int8 if form == "int8" else torch.float8_e4m3fn), scale


class StoredLayer(nn.Module):
    """A frozen layer whose weight is quantised, in main memory, or both.

    `values` and `scale` make the weight, `shift` is the bias. In main memory they are of `OffloadedBlocks`, and
    Module.to does not move them. Module.to must not change dtypes. `weight` and `bias` are those of a plain layer.
    """

    values: Tensor | None
    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, layer: Any, form: WeightFormat, device: torch.device) -> None:
        """Quantises on `device`, and leaves the values there."""
        super().__init__()
        weight = layer.weight.detach()
        values, scale = (weight, None) if form == "full" else quantised(weight.to(device), form)
        bias = None if layer.bias is None else layer.bias.detach()
        for name, tensor in zip(_STORED, (values, scale, bias), strict=True):
            self.register_buffer(name, tensor)
        self._blocks: OffloadedBlocks | None = None
        self._index = 0
        self._positions: dict[str, int] = {}

    def stored(self) -> dict[str, Tensor]:
        """The tensors of the layer that are not in main memory."""
        return dict(self.named_buffers())

    def wait_in(self, blocks: OffloadedBlocks, index: int, start: int) -> None:
        """From here on the layer has the tensors of `blocks` from position `start` of the block `index` on."""
        names = list(self.stored())
        self._blocks, self._index = blocks, index
        self._positions = {name: start + number for number, name in enumerate(names)}
        for name in names:
            setattr(self, name, None)

    def dense(self) -> Tensor:
        """The weight on the device in the dtype of the computation. To be asked for at each use, not kept."""
        values, scale = self._read("values"), self._read("scale")
        assert values is not None
        return values if scale is None else values.to(scale.dtype).mul_(scale)

    @property
    def weight(self) -> Tensor:
        return self.dense()

    @property
    def bias(self) -> Tensor | None:
        return self._read("shift")

    def _read(self, name: str) -> Tensor | None:
        if self._blocks is None:
            return getattr(self, name)
        position = self._positions.get(name)
        return None if position is None else self._blocks.tensors(self._index)[position]

    def forward(self, x: Tensor) -> Tensor:
        return _Frozen.apply(x, self)

    def compute(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def input_gradient(self, grad: Tensor, size: torch.Size, stride: tuple[int, ...]) -> Tensor:
        """The gradient of an input of this size and stride."""
        raise NotImplementedError


class StoredLinear(StoredLayer):
    """nn.Linear with a stored weight."""

    def __init__(self, layer: nn.Linear, form: WeightFormat, device: torch.device) -> None:
        super().__init__(layer, form, device)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def compute(self, x: Tensor) -> Tensor:
        return linear(x, self.dense(), self.bias)

    def input_gradient(self, grad: Tensor, size: torch.Size, stride: tuple[int, ...]) -> Tensor:
        return (grad.flatten(0, -2) @ self.dense()).view(size)


class StoredConv2d(StoredLayer):
    """nn.Conv2d with a stored weight and zeros as padding."""

    def __init__(self, layer: nn.Conv2d, form: WeightFormat, device: torch.device) -> None:
        super().__init__(layer, form, device)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride = layer.kernel_size, layer.stride
        self.padding, self.dilation, self.groups = layer.padding, layer.dilation, layer.groups

    def compute(self, x: Tensor) -> Tensor:
        return conv2d(x, self.dense(), self.bias, self.stride, self.padding, self.dilation, self.groups)

    def input_gradient(self, grad: Tensor, size: torch.Size, stride: tuple[int, ...]) -> Tensor:
        """By torch's own operation, which takes of the input only its geometry if no other gradient is asked for."""
        return torch.ops.aten.convolution_backward(
            grad,
            grad.new_empty_strided(size, stride),
            self.dense(),
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0, 0],
            self.groups,
            [True, False, False],
        )[0]


class _Frozen(torch.autograd.Function):
    """A stored layer. Nothing is saved: the input's gradient needs the weight only, which is made again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: StoredLayer) -> Tensor:  # type: ignore[override]
        ctx.layer, ctx.size, ctx.stride = layer, x.shape, x.stride()
        return layer.compute(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.layer.input_gradient(grad, ctx.size, ctx.stride), None


def dense(layer: Any) -> Tensor:
    """The weight of a stored or a plain layer, to be asked for at each use and not kept."""
    return layer.dense() if isinstance(layer, StoredLayer) else layer.weight


def bias_of(layer: Any) -> Tensor | None:
    """The bias of a stored or a plain layer, to be asked for at each use and not kept."""
    return layer.bias


def weight_blocks(unet: Any) -> list[nn.Module]:
    """The transformer blocks, resnets, downsamplers and upsamplers of SDXL's UNet in the order of its forward pass."""
    mid = unet.mid_block
    found = [block for stage in unet.down_blocks for block in _stage_blocks(stage, stage.resnets)]
    found += [mid.resnets[0], *_stage_blocks(mid, mid.resnets[1:], attention_first=True)]
    return found + [block for stage in unet.up_blocks for block in _stage_blocks(stage, stage.resnets)]


def _stage_blocks(stage: Any, resnets: Any, attention_first: bool = False) -> Iterator[nn.Module]:
    for resnet, attention in zip_longest(resnets, getattr(stage, "attentions", ())):
        parts = [[resnet], attention.transformer_blocks if attention else []]
        for part in reversed(parts) if attention_first else parts:
            yield from part
    for name in ("downsamplers", "upsamplers"):
        yield from getattr(stage, name, None) or ()


def spread(count: int, total: int) -> list[int]:
    """`count` of the indices below `total`, at equal distances: while a block is copied, those between compute."""
    count = min(count, total)
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


@torch.no_grad()
def store_weights(unet: Any, form: WeightFormat, offloaded: int, device: torch.device) -> OffloadedBlocks | None:
    """Replaces frozen layers of the UNet by stored ones. Returns what is in main memory, None if nothing is.

    Quantises on `device` layer by layer, so that it never has more than one weight in full: the layers of
    `weight_blocks`, and the projections around transformer blocks. The other weights are small, and errors in them
    count more. Layers of `offloaded` blocks, at most all, stay in main memory. Move the UNet, which is on the CPU if
    anything is quantised or offloaded, to `device` afterwards. Convolutions in full are replaced, too: torch's own save
    their input for a gradient of the weight, which a frozen one does not have.
    """
    order = weight_blocks(unet)
    waiting = set(spread(offloaded, len(order)))
    blocks = OffloadedBlocks(device) if waiting else None
    for index, block in enumerate(order):
        if blocks and index in waiting:
            _offload(_replace(block, form, device), blocks)
        else:
            _replace(block, form, device, nn.Conv2d if form == "full" else _LAYERS)
    if form != "full":
        for transformer in _transformers(unet):
            _replace(transformer, form, device)
    return blocks


def _transformers(unet: Any) -> Iterator[nn.Module]:
    for stage in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        yield from getattr(stage, "attentions", ())


def _places(module: nn.Module, kinds: Any = _LAYERS) -> list[tuple[nn.Module, str]]:
    """Where frozen layers are, as their parent and their name in it. A peft layer is the parent of its base."""
    return [
        (parent, name)
        for parent in module.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, kinds) and not any(parameter.requires_grad for parameter in layer.parameters())
    ]


def _replace(module: nn.Module, form: WeightFormat, device: torch.device, kinds: Any = _LAYERS) -> list[StoredLayer]:
    """Replaces one layer after the other, so that the original weight of each is freed before the next."""
    stored: list[StoredLayer] = []
    for parent, name in _places(module, kinds):
        layer = getattr(parent, name)
        kind: Any = StoredLinear if isinstance(layer, nn.Linear) else StoredConv2d
        stored.append(kind(layer, form, device))
        setattr(parent, name, stored[-1])
        del layer
    return stored


def _offload(layers: list[StoredLayer], blocks: OffloadedBlocks) -> None:
    index = blocks.add([tensor for layer in layers for tensor in layer.stored().values()])
    start = 0
    for layer in layers:
        count = len(layer.stored())
        layer.wait_in(blocks, index, start)
        start += count


class StoredBytes(NamedTuple):
    """Bytes on the device. `resident`: weights that stay; `window`: the most of others at once.

    Those are two neighbours in main memory, and the largest weight that is made of quantised values.
    """

    resident: int
    window: int


def stored_bytes(unet: Any, form: WeightFormat, offloaded: int) -> StoredBytes:
    """What the frozen weights would take after `store_weights`, from the shapes and dtypes of a UNet before it."""
    groups = [_layers(block) for block in weight_blocks(unet)]
    waiting = spread(offloaded, len(groups))
    inside = [layer for group in groups for layer in group]
    known = set(inside)
    around = [layer for part in _transformers(unet) for layer in _layers(part) if layer not in known]
    staying = [layer for index, group in enumerate(groups) if index not in waiting for layer in group] + around
    frozen = sum(weight.nbytes for weight in unet.parameters() if not weight.requires_grad)
    resident = frozen - _bytes(inside + around, "full") + _bytes(staying, form)
    window = largest_window(
        [packed_bytes(size for layer in groups[index] for size in _sizes(layer, form)) for index in waiting]
    )
    made = 0 if form == "full" else max(layer.weight.nbytes for layer in inside + around)
    return StoredBytes(resident, window + made)


def _layers(module: nn.Module) -> list[Any]:
    return [getattr(parent, name) for parent, name in _places(module)]


def _bytes(layers: list[Any], form: WeightFormat) -> int:
    return sum(size for layer in layers for size in _sizes(layer, form))


def _sizes(layer: Any, form: WeightFormat) -> list[int]:
    """Bytes of the layer's stored tensors."""
    weight, bias = layer.weight, layer.bias
    sizes = [weight.nbytes] if form == "full" else [weight.numel(), weight.shape[0] * weight.element_size()]
    return sizes if bias is None else [*sizes, bias.nbytes]
