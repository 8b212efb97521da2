"""Counts the bytes of tensors while code runs, on real tensors or on fake ones, which take no memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode


def fake_tensors() -> FakeTensorMode:
    """FakeTensorMode in which modules can be converted, as peft does with a layer's factors.

    Module.to exchanges fake parameters by torch.utils.swap_tensors, which refuses tensors with weak references. The
    mode's converter keeps such references to find results again that it has wrapped; those of kernels are always new.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    converter: Any = mode.fake_tensor_converter
    converter.set_tensor_memo = lambda tensor, fake: None
    return mode


class StorageCount(TorchDispatchMode):
    """Counts the bytes of the storages that are created inside the context, until each of them is freed.

    `allocated` are the bytes of those that are alive, also after the context has been left; `peak` is the most that
    `allocated` has been. Views and results in place share the storage of their input and cost nothing. Under
    FakeTensorMode, enter this context inside of that one. `round_to` rounds every storage up to a multiple, as CUDA's
    caching allocator does with 512.

    Not seen are what a kernel allocates for itself, real tensors that are made of Python's numbers or of other memory,
    and `UntypedStorage.resize_` until an operation returns the tensor.
    """

    def __init__(self, round_to: int = 1) -> None:
        super().__init__()
        self.round_to = round_to
        self.allocated = self.peak = 0
        self._sizes: dict[int, int] = {}  # bytes of the living storages by their address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata in self._sizes:
                self._resize(storage)
            elif not any(storage._cdata == own.untyped_storage()._cdata for own in _tensors((args, kwargs))):
                weakref.finalize(storage, self._free, storage._cdata).atexit = False
                self._resize(storage)
        return result

    def _resize(self, storage: torch.UntypedStorage) -> None:
        """An operation with `out` may have resized a storage that is known."""
        size = -(-storage.nbytes() // self.round_to) * self.round_to
        self.allocated += size - self._sizes.get(storage._cdata, 0)
        self._sizes[storage._cdata] = size
        self.peak = max(self.peak, self.allocated)

    def _free(self, address: int) -> None:
        self.allocated -= self._sizes.pop(address)


def peak_of(run: Callable[[], object]) -> int:
    """The most bytes that tensors made by `run` take at once, without those that exist before."""
    with StorageCount() as count:
        run()
    return count.peak


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors among arguments or results; quicker than torch's pytree for the few containers of an operation."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(tuple(values.values()))
