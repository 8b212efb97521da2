"""The owner of loaded weights: one module per part of a model, reloaded only when its content key changes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from .device import out_of_memory_named


class Loaded(NamedTuple):
    """A module, and the `state` that its loader needs to change it later."""

    module: nn.Module
    state: Any = None


def _cannot_change(_: Loaded) -> Loaded | None:
    return None


@dataclass(frozen=True)
class PartRequest:
    """A part that is needed on the device.

    `key` changes with the content of the weights. If the part is held with another key, `change` may modify it in
    place; if that returns None, `load` is called. `change` may raise ValueError only as long as it has not changed
    anything. `room` is the memory in bytes that computing with the part takes beside its weights. `offload` overrides
    the owner's setting: whether the part leaves the device after use.
    """

    name: str
    key: str
    load: Callable[[], Loaded]
    change: Callable[[Loaded], Loaded | None] = _cannot_change
    room: int = 0
    offload: bool | None = None


class LoadedParts:
    """Holds at most one module per part and moves whole parts to and from the device.

    `offload` says whether a part leaves the device after use. Subclasses with another memory manager override
    `to_device`, `to_cpu` and `released`.
    """

    def __init__(self, device: torch.device, offload: bool = False) -> None:
        self.device = device
        self.offload = offload
        self._held: dict[str, tuple[str, Loaded]] = {}

    @contextmanager
    def phase(self, request: PartRequest) -> Iterator[Loaded]:
        """The part on the device, for the duration of the block."""
        try:
            yield self.borrow(request)
        finally:
            self.finish(request.name, request.offload)

    def borrow(self, request: PartRequest) -> Loaded:
        """The part on the device, until `finish`. Raises torch.OutOfMemoryError, and drops it, if it does not fit."""
        # ComfyUI calls from inside inference mode; weights loaded or moved in there could never be trained on.
        with torch.inference_mode(False), torch.no_grad():
            name = request.name
            if name in self._held and self._held[name][0] != request.key:
                self._change(request)
            if name not in self._held:
                self._held[name] = request.key, request.load()
            loaded = self._held[name][1]
            self._arrive(request, loaded.module)
            return loaded

    def _arrive(self, request: PartRequest, module: nn.Module) -> None:
        gigabytes = sum(weight.nbytes for weight in module.parameters()) / 1e9
        remedy = "set the base's precision to bf16 or fp16, offload to phase, or close programs that use the memory"
        doing = f"moving the {request.name} ({gigabytes:.1f} GB) to the {self.device.type}"
        with out_of_memory_named(doing, remedy):
            try:
                self.to_device(request.name, module, request.room)
            except BaseException:
                self.drop(request.name)  # part of it may be on the device
                raise

    def _change(self, request: PartRequest) -> None:
        try:
            changed = request.change(self._held[request.name][1])
        except ValueError:
            raise  # the request does not fit, and the held part is unchanged
        except BaseException:
            self.drop(request.name)
            raise
        if changed is None:
            self.drop(request.name)
        else:
            self._held[request.name] = request.key, changed

    def finish(self, name: str, offload: bool | None = None) -> None:
        """Ends the use of a part. `offload` overrides the owner's setting for this call."""
        if name in self._held and (self.offload if offload is None else offload):
            with torch.inference_mode(False), torch.no_grad():
                self.to_cpu(name, self._held[name][1].module)

    def drop(self, name: str) -> None:
        """Releases a part; the next `borrow` loads it again."""
        if name in self._held:
            self.released(name, self._held.pop(name)[1].module)

    def drop_others(self, prefix: str, kept: Collection[str]) -> None:
        """Releases the parts whose names begin with `prefix` and are not in `kept`."""
        for name in [name for name in self._held if name.startswith(prefix) and name not in kept]:
            self.drop(name)

    def drop_all(self) -> None:
        for name in list(self._held):
            self.drop(name)

    def to_device(self, name: str, module: nn.Module, room: int = 0) -> None:
        module.to(self.device)

    def to_cpu(self, name: str, module: nn.Module) -> None:
        module.to("cpu")

    def released(self, name: str, module: nn.Module) -> None:
        """Called with a part that is no longer held."""
