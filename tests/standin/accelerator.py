"""An accelerator without hardware: tensors of a device type of their own, computed by the CPU's kernels.

It shows what a GPU would: tensors on the wrong device, memory that is not freed, waits for the device, and what happens
when memory runs out. Numbers are the CPU's. It has one device and no streams, asynchrony or caching allocator.

`install` once in a process of its own: torch cannot take a backend back. It uses private names of torch, which
`unsupported` looks for.
"""

from __future__ import annotations

import ctypes
import functools
import operator
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

NAME = "accel"
_CPU, _EXTENSION = 1, 12  # DLPack's numbers of device types
_PRIVATE = (
    "torch._C._to_dlpack",
    "torch._C._from_dlpack",
    "torch._C._dynamo.guards._reinterpret_tensor",
    "torch.utils.backend_registration._setup_privateuseone_for_python_backend",
)

# Operations without a CPU kernel that would be taken apart into ones that only registered backends have.
_WHOLE = ("convolution", "convolution_backward", "copy_")
# Operations with kernels of their own here.
_OWN = ("scaled_dot_product_attention", "as_strided")
# Operations that need a result on the host before they can go on.
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim")
# Operations in which CPU tensors of any size may meet device tensors.
_MIXED = ("copy_", "index", "_index_put_impl_")


@dataclass
class Accelerator:
    """The state of the device. `limit` is its memory in bytes."""

    limit: int = 2**40
    allocated: int = 0
    peak: int = 0
    waits: Counter[str] = field(default_factory=Counter)
    random: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def allocate(self, owner: Tensor) -> None:
        size = owner.untyped_storage().nbytes()
        if self.allocated + size > self.limit:
            raise torch.OutOfMemoryError(f"accel out of memory: {self.allocated + size} bytes of {self.limit}")
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        weakref.finalize(owner, self._free, size)

    def _free(self, size: int) -> None:
        self.allocated -= size

    @contextmanager
    def limited(self, size: int) -> Iterator[None]:
        """Within the block the device has `size` bytes more than are in use."""
        before, self.limit = self.limit, self.allocated + size
        try:
            yield
        finally:
            self.limit = before


ACCEL = Accelerator()


def unsupported() -> str | None:
    """Why this version of torch cannot have the stand-in; None if it can."""
    for name in _PRIVATE:
        try:
            operator.attrgetter(name.removeprefix("torch."))(torch)
        except AttributeError:
            return f"torch {torch.__version__} has no {name}"
    return None


def install() -> None:
    """Registers the device with torch, for the rest of this process."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, _Module())
    library = torch.library.Library("aten", "IMPL")
    for operation in _operations():
        library.impl(operation, _kernel(operation), "PrivateUse1")
    for key in ("PrivateUse1", "AutogradPrivateUse1"):
        library.impl("scaled_dot_product_attention", _attention, key)
    library.impl("as_strided", _as_strided, "PrivateUse1")
    _KEPT.append(library)


_KEPT: list[Any] = []  # a library's kernels are removed with it


class _Module:
    """What torch.cuda is for CUDA."""

    def is_available(self) -> bool:
        return True

    is_initialized = is_available
    is_bf16_supported = is_available

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        ACCEL.waits["synchronize"] += 1

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def manual_seed(self, seed: int) -> None:
        ACCEL.random.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_rng_state(self, device: Any = None) -> Tensor:
        return ACCEL.random.get_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        ACCEL.random.set_state(state)

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return ACCEL.limit - ACCEL.allocated, ACCEL.limit

    def memory_allocated(self, device: Any = None) -> int:
        return ACCEL.allocated

    memory_reserved = memory_allocated

    def max_memory_allocated(self, device: Any = None) -> int:
        return ACCEL.peak

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        ACCEL.peak = ACCEL.allocated

    def empty_cache(self) -> None:
        pass


# Tensors of the device and of the CPU on the same memory


def _aliased(tensor: Tensor, device: int) -> Tensor:
    capsule = torch._C._to_dlpack(tensor.detach() if tensor.requires_grad else tensor)
    managed = _POINTER(capsule, b"dltensor")
    ctypes.c_int32.from_address(managed + 8).value = device
    ctypes.c_int32.from_address(managed + 12).value = 0
    return torch._C._from_dlpack(capsule)


_POINTER = ctypes.pythonapi.PyCapsule_GetPointer
_POINTER.restype, _POINTER.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def _on_device(tensor: Tensor) -> Tensor:
    """A device tensor on the memory of a new CPU tensor, which it owns."""
    ACCEL.allocate(tensor)
    return _aliased(tensor, _EXTENSION)


def _on_cpu(tensor: Tensor) -> Tensor:
    return _aliased(tensor, _CPU) if _is_own(tensor) else tensor


def _is_own(tensor: Tensor) -> bool:
    return tensor.device.type == NAME


# Kernels


def _operations() -> list[str]:
    """All operations with a CPU kernel, those on lists of tensors, and `_WHOLE`."""
    names = []
    for full in torch._C._dispatch_get_all_op_names():
        namespace, _, name = full.partition("::")
        if namespace != "aten" or name.startswith(_OWN):
            continue
        base = name.partition(".")[0]
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(full, "CPU")
        if has_kernel or base.startswith("_foreach_") or base in _WHOLE:
            names.append(name)
    return names


def _kernel(name: str) -> Callable[..., Any]:
    base, _, overload = name.partition(".")
    operation: Any = getattr(getattr(torch.ops.aten, base), overload or "default")
    arguments = operation._schema.arguments
    writes = any(argument.alias_info and argument.alias_info.is_write for argument in arguments)
    outputs = [argument.name for argument in arguments if argument.is_out]
    draws = torch.Tag.nondeterministic_seeded in operation.tags
    takes_generator = draws and any(argument.name == "generator" for argument in arguments)
    pointwise = torch.Tag.pointwise in operation.tags or base in ("where", "add_", "fill_", "masked_fill", "lerp")

    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = _tensors([*args, *kwargs.values()])
        if base not in _MIXED:
            _require_one_device(name, tensors, pointwise)
        _count_wait(base, args)
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        if kwargs.get("pin_memory"):
            raise RuntimeError("accel has no pinned memory")
        if takes_generator:
            if kwargs.get("generator") is not None:
                raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")
            kwargs["generator"] = ACCEL.random
        inputs = tree_map_only(Tensor, _on_cpu, (args, kwargs))
        with _own_random(draws and not takes_generator):
            if outputs and any(kwargs[one].numel() == 0 for one in outputs if isinstance(kwargs.get(one), Tensor)):
                return _fill_outputs(operation, inputs, kwargs, outputs)
            results = operation(*inputs[0], **inputs[1])
        return tree_map_only(Tensor, functools.partial(_returned, arguments=tensors, written=writes), results)

    return run


def _fill_outputs(operation: Any, inputs: Any, kwargs: dict[str, Any], outputs: Sequence[str]) -> Any:
    """A borrowed storage cannot be resized: the results become the contents of the `out` tensors."""
    new = {name: torch.empty(0, dtype=kwargs[name].dtype) for name in outputs}
    operation(*inputs[0], **{**inputs[1], **new})
    for name in outputs:
        kwargs[name].data = _on_device(new[name])
    found = tuple(kwargs[name] for name in outputs)
    return found if len(found) > 1 else found[0]


def _returned(result: Tensor, arguments: Sequence[Tensor], written: bool) -> Tensor:
    """An argument that was written to, a view of one, or a new tensor."""
    for tensor in arguments:
        if _shares(tensor, result):
            if written and tensor.shape == result.shape and tensor.stride() == result.stride():
                return tensor
            return _view(tensor, result) if _is_own(tensor) else result
    return _on_device(result)


def _shares(tensor: Tensor, result: Tensor) -> bool:
    storage = tensor.untyped_storage()
    start = storage.data_ptr()
    return bool(storage.nbytes()) and start <= result.untyped_storage().data_ptr() < start + storage.nbytes()


def _view(tensor: Tensor, result: Tensor) -> Tensor:
    """The tensor's memory in the geometry of `result`."""
    apart = (result.data_ptr() - tensor.data_ptr()) // tensor.element_size()
    with torch.inference_mode(tensor.is_inference()):
        view = torch._C._dynamo.guards._reinterpret_tensor(tensor, result.shape, result.stride(), apart)
        return view if view.dtype == result.dtype else view.view(result.dtype)


def _as_strided(
    tensor: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Tensor:
    """The offset counts from the start of the storage, which the CPU's tensor on the same memory does not know."""
    apart = 0 if storage_offset is None else storage_offset - tensor.storage_offset()
    with torch.inference_mode(tensor.is_inference()):
        return torch._C._dynamo.guards._reinterpret_tensor(tensor, size, stride, apart)


def _count_wait(base: str, args: Sequence[Any]) -> None:
    to_host = base == "copy_" and not _is_own(args[0]) and _is_own(args[1])
    if base in _WAITS or to_host:
        ACCEL.waits[base] += 1


@contextmanager
def _own_random(needed: bool) -> Iterator[None]:
    """torch's default generator has the state of the device's, for operations that take no generator."""
    if not needed:
        yield
        return
    before = torch.get_rng_state()
    torch.set_rng_state(ACCEL.random.get_state())
    try:
        yield
    finally:
        ACCEL.random.set_state(torch.get_rng_state())
        torch.set_rng_state(before)


def _require_one_device(name: str, tensors: Sequence[Tensor], pointwise: bool) -> None:
    """On CUDA, too, tensors of one element pass from the CPU in pointwise operations only."""
    foreign = [tensor for tensor in tensors if not _is_own(tensor) and (tensor.dim() or not pointwise)]
    if foreign and any(map(_is_own, tensors)):
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} found {NAME} and cpu")


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    found = [value for value in values if isinstance(value, Tensor)]
    for value in values:
        if isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """One launch, with a backward pass of its own."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=options.get("scale"))[0]
