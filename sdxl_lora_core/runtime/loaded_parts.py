"""The owner of loaded weights: one module per part, reloaded only when its content key changes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn

Change = Callable[[nn.Module], bool]


def _never(_: nn.Module) -> bool:
    return False


class LoadedParts:
    """Holds at most one module for each part of a model and moves whole parts to and from the device.

    `offload` says whether a part leaves the device when its phase is over. Subclasses with another memory manager
    override `arrive`, `leave` and `forget`.
    """

    def __init__(self, device: torch.device, offload: bool = False) -> None:
        self.device = device
        self.offload = offload
        self.borrowed: set[str] = set()  # whoever wants to know what was used empties it before
        self._held: dict[str, tuple[str, nn.Module]] = {}

    @contextmanager
    def phase(
        self,
        part: str,
        key: str,
        load: Callable[[], nn.Module],
        offload: bool | None = None,
        change: Change = _never,
        room: int = 0,
    ) -> Iterator[nn.Module]:
        """borrow, and rest afterwards, whatever happens in between."""
        try:
            yield self.borrow(part, key, load, change, room)
        finally:
            self.rest(part, offload)

    def borrow(
        self, part: str, key: str, load: Callable[[], nn.Module], change: Change = _never, room: int = 0
    ) -> nn.Module:
        """The module of `part` on the device, where `room` is what computing with it takes beside the weights (bytes).

        When what is held has another key than `key`, `change` may turn it into what is wanted where it lies; where it
        says that it cannot, `load` is called. It raises ValueError only as long as it has changed nothing.
        """
        # ComfyUI calls from inside inference mode; weights loaded or moved in there could never be trained on.
        with torch.inference_mode(False), torch.no_grad():
            if part in self._held and self._held[part][0] != key:
                self._change(part, key, change)
            if part not in self._held:
                self._held[part] = key, load()
            module = self._held[part][1]
            self.arrive(part, module, room)
            self.borrowed.add(part)
            return module

    def _change(self, part: str, key: str, change: Change) -> None:
        module = self._held[part][1]
        try:
            changed = change(module)
        except ValueError:
            raise  # what is wanted does not fit, and what is held is whole
        except BaseException:
            self.drop(part)
            raise
        if changed:
            self._held[part] = key, module
        else:
            self.drop(part)

    def held(self, part: str) -> nn.Module | None:
        """The module of `part` if it is loaded, wherever it lies."""
        return self._held[part][1] if part in self._held else None

    def rest(self, part: str, offload: bool | None = None) -> None:
        """The phase that needed `part` is over. `offload` decides for this call in place of the owner's own setting."""
        if part in self._held and (self.offload if offload is None else offload):
            with torch.inference_mode(False), torch.no_grad():
                self.leave(part, self._held[part][1])

    def drop(self, part: str) -> None:
        """Lets go of `part`; the next borrow loads it anew."""
        if part in self._held:
            self.forget(part, self._held.pop(part)[1])

    def drop_others(self, kind: str, wanted: Collection[str]) -> None:
        """Lets go of the parts whose names begin with `kind` and are not in `wanted`."""
        for part in [part for part in self._held if part.startswith(kind) and part not in wanted]:
            self.drop(part)

    def drop_all(self) -> None:
        for part in list(self._held):
            self.drop(part)

    def arrive(self, part: str, module: nn.Module, room: int = 0) -> None:
        module.to(self.device)

    def leave(self, part: str, module: nn.Module) -> None:
        module.to("cpu")

    def forget(self, part: str, module: nn.Module) -> None:
        """Called with a part that is no longer held."""
