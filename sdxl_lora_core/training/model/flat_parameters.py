"""All trained parameters in one buffer, their gradients in another, and a copy in the number format of the base.

One tensor in place of more than a thousand: an update, a norm or a moving average is one operation, and no step casts
or scales a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ParameterGroup:
    """float32 parameters in a fixed order, with a learning rate of `rate_factor` times the run's."""

    parameters: list[nn.Parameter]
    rate_factor: float = 1.0


class FlatParameters:
    """Puts the parameters of `groups` into flat float32 buffers; each parameter and its `.grad` become views of them.

    `scales` are the parameters of fused layers (see lora_linear), each with the factor on it in the forward pass. For
    these there are two more buffers in `dtype`: `low`, the scaled copies to compute with, and the gradients of a pass,
    which are added to the float32 ones by `collect`.

    Attributes: `values` and `gradients`, float32 [N]; `whole`, the two as one parameter with its gradient;
    `groups`, as given.
    """

    def __init__(self, groups: Sequence[ParameterGroup], scales: Mapping[nn.Parameter, float], dtype: torch.dtype):
        self.parameters = [parameter for group in groups for parameter in group.parameters]
        ends = _ends([parameter.numel() for parameter in self.parameters])
        self._spans = {parameter: slice(*span) for parameter, span in zip(self.parameters, pairwise(ends), strict=True)}
        self._scaled = _runs([(self._spans[parameter], scales.get(parameter)) for parameter in self.parameters])
        self._group_spans = [_joined([self._spans[parameter] for parameter in group.parameters]) for group in groups]
        self.values = torch.cat([parameter.detach().flatten() for parameter in self.parameters])
        self.gradients = torch.zeros_like(self.values)
        fused = sum(span.stop - span.start for span, _ in self._scaled)
        self.low = self.values.new_empty(len(self.values) if fused else 0, dtype=dtype)
        self.pass_gradients = torch.zeros_like(self.low)
        self.groups = groups
        self._flat = [
            ParameterGroup([nn.Parameter(self.values[span])], group.rate_factor)
            for span, group in zip(self._group_spans, groups, strict=True)
        ]
        self.whole = nn.Parameter(self.values)
        self._on_move: list[Callable[[FlatParameters], None]] = []
        self._rebind()
        self.refresh()

    def groups_for(self, elementwise: bool) -> Sequence[ParameterGroup]:
        """The groups for an optimizer: one flat parameter each if its update is element-wise, else shaped ones."""
        return self._flat if elementwise else self.groups

    @torch.no_grad()
    def refresh(self) -> None:
        """Computes the scaled copies again. To be called after every change of the values."""
        for span, scale in self._scaled:
            torch.mul(self.values[span], scale, out=self.low[span])

    @torch.no_grad()
    def assign(self, values: Tensor) -> None:
        """Replaces all values by `values`, [N], on any device."""
        self.values.copy_(values)
        self.refresh()

    @torch.no_grad()
    def collect(self) -> None:
        """Adds the gradients of the last pass through fused layers to `gradients`."""
        for span, scale in self._scaled:
            self.gradients[span].add_(self.pass_gradients[span], alpha=scale)
        self.pass_gradients.zero_()

    def clear_gradients(self) -> None:
        self.gradients.zero_()
        self.pass_gradients.zero_()

    def to(self, device: torch.device) -> None:
        """Moves the buffers, after the modules that own the parameters have been moved."""
        for name in ("values", "gradients", "low", "pass_gradients"):
            setattr(self, name, getattr(self, name).to(device))
        self._rebind()
        for take_views in self._on_move:
            take_views(self)

    def with_views(self, take_views: Callable[[FlatParameters], None]) -> None:
        """Calls `take_views` with these parameters now and whenever the buffers have moved."""
        self._on_move.append(take_views)
        take_views(self)

    def low_rows(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """The scaled copies of adjacent matrices with equal row length, as one matrix."""
        return self._stacked(self.low, parameters)

    def pass_rows(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """The gradients of a pass, in the form of `low_rows`."""
        return self._stacked(self.pass_gradients, parameters)

    def are_adjacent(self, parameters: Sequence[nn.Parameter]) -> bool:
        spans = [self._spans[parameter] for parameter in parameters]
        return all(one.stop == other.start for one, other in pairwise(spans))

    def _stacked(self, buffer: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        return buffer[_joined([self._spans[parameter] for parameter in parameters])].view(-1, parameters[0].shape[-1])

    def _rebind(self) -> None:
        for parameter, span in self._spans.items():
            parameter.data = self.values[span].view(parameter.shape)
            parameter.grad = self.gradients[span].view(parameter.shape)
        spans = [slice(None), *self._group_spans]
        for span, flat in zip(spans, [self.whole, *(group.parameters[0] for group in self._flat)], strict=True):
            torch.utils.swap_tensors(flat, nn.Parameter(self.values[span]))  # optimizers know it by its identity
            flat.grad = self.gradients[span]


def _ends(sizes: Sequence[int]) -> list[int]:
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    return ends


def _joined(spans: Sequence[slice]) -> slice:
    return slice(spans[0].start, spans[-1].stop)


def _runs(scaled: Sequence[tuple[slice, float | None]]) -> list[tuple[slice, float]]:
    """Neighbours with the same scale as one span; those without a scale are left out."""
    runs = [(scale, [span for span, _ in run]) for scale, run in groupby(scaled, key=lambda item: item[1])]
    return [(_joined(spans), scale) for scale, spans in runs if scale is not None]
