"""The compute device: its memory, its random numbers and the precision it supports.

A device other than the CPU is asked through torch's module for its type (torch.cuda, torch.xpu, torch.mps, torch.npu),
so that devices this pack has never seen work if their module has CUDA's functions.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..messages import brief

_TRANSFER = 64 * 2**20  # bytes, about; the tensors of a transfer are on the device twice

# AMD GPUs without bf16 instructions: RDNA 2 and older. torch emulates them and reports bf16 as supported.
_AMD_WITHOUT_BF16 = ("gfx803", "gfx900", "gfx906", "gfx101", "gfx103")


def default_device() -> torch.device:
    """The machine's accelerator, else the CPU. Processes that share a machine have one accelerator each."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    return torch.device(kind.type if kind else "cpu", int(os.environ.get("LOCAL_RANK", "0")))


def free_memory(device: torch.device) -> float:
    """Bytes that can still be allocated on `device`; infinity if it does not say."""
    if device.type == "cpu":
        import psutil

        return psutil.virtual_memory().available
    module = _module(device)
    if device.type == "mps":
        return module.recommended_max_memory() - module.driver_allocated_memory()
    if not hasattr(module, "mem_get_info"):
        return math.inf
    unused = module.memory_reserved(device) - module.memory_allocated(device)
    return module.mem_get_info(device)[0] + unused


def copied_to_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the tensors on the CPU, moved in few transfers, because each waits for the device."""
    bytes_so_far: Counter[tuple[torch.dtype, torch.device]] = Counter()
    transfers: defaultdict[object, list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        kind = tensor.dtype, tensor.device
        transfers[kind, bytes_so_far[kind] // _TRANSFER].append(i)
        bytes_so_far[kind] += tensor.nbytes
    copies: dict[int, Tensor] = {}
    for group in transfers.values():
        parts_on_device = [tensors[i].detach().flatten() for i in group]
        flat = (torch.cat(parts_on_device) if len(group) > 1 else parts_on_device[0]).to("cpu")
        parts = flat.split([tensors[i].numel() for i in group])
        copies |= {i: part.view(tensors[i].shape).clone() for i, part in zip(group, parts, strict=True)}
    return [copies[i] for i in range(len(tensors))]


class DeviceMemory:
    """The memory that a run may use on `device`. A host that manages it overrides this."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def least(self) -> bool:
        """Whether to take as little as possible, however much is free."""
        return False

    def free(self) -> float:
        """Bytes that the run may take."""
        return free_memory(self.device)

    def take(self, size: int) -> None:
        """Announces that the run takes `size` bytes, so that the host can make room."""


class LateRead:
    """Values that are copied to main memory while the device goes on, float32 [N] on the device.

    Only devices that `can_pin` go on; others finish their work when the values are read.
    """

    def __init__(self, values: Tensor) -> None:
        self._values, self._copied = values, None
        if can_pin(values.device):
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = _module(values.device).Event()
            self._copied.record()

    def read(self) -> list[float]:
        """Waits until the copy has arrived, not for work that was queued after it."""
        if self._copied:
            self._copied.synchronize()
        return self._values.tolist()


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a tensor in main memory on the device, for which the host does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if can_pin(device) else tensor.to(device)


def move_module(module: nn.Module, device: torch.device) -> None:
    """Module.to that keeps the parameter objects, also on devices of other packages, such as DirectML.

    There torch makes new parameters, unless it is told to exchange their contents.
    """
    future, foreign = torch.__future__, torch._C._get_privateuse1_backend_name()
    types = {device.type, *(parameter.device.type for parameter in module.parameters())}
    exchanges = future.get_swap_module_params_on_conversion()
    future.set_swap_module_params_on_conversion(exchanges or foreign in types)
    try:
        module.to(device)
    finally:
        future.set_swap_module_params_on_conversion(exchanges)


def can_pin(device: torch.device) -> bool:
    """Whether copies from and to page-locked memory can overlap with computation on this device."""
    return device.type in ("cuda", "xpu")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out. CUDA raises a class of its own; cuBLAS, cuDNN, MPS and the CPU only say so in words."""
    words = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


@contextmanager
def out_of_memory_named(doing: str, remedy: str) -> Iterator[None]:
    """Within the block, an error of exhausted memory becomes torch.OutOfMemoryError with these words in one line."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error) or isinstance(error, OutOfMemory):
            raise
        raise OutOfMemory(f"out of memory while {doing}: {remedy} ({brief(error)})") from error


class OutOfMemory(torch.OutOfMemoryError):
    """Says what was done, so that a block around it leaves it as it is."""


def release_memory(device: torch.device) -> None:
    """Frees unreachable objects and returns unused memory: torch's to the device, the process's own to the system."""
    gc.collect()
    trim_heap()
    if hasattr(module := _module(device), "empty_cache"):
        module.empty_cache()


def trim_heap() -> None:
    """Returns freed main memory to the system, where glibc would keep gigabytes of freed weights for itself."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def memory_in_use(device: torch.device) -> int:
    """Bytes in use: torch's peak since `reset_peak`, or the resident memory of the process if torch counts none."""
    if hasattr(module := _module(device), "max_memory_allocated"):
        return module.max_memory_allocated(device)
    import psutil

    return psutil.Process().memory_info().rss


def reset_peak(device: torch.device) -> None:
    """Starts counting the peak that `memory_in_use` returns."""
    if hasattr(module := _module(device), "reset_peak_memory_stats"):
        module.reset_peak_memory_stats(device)


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16 without emulation. One that does not say is taken for one that does not."""
    if device.type == "cuda" and torch.version.hip:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return not name.startswith(_AMD_WITHOUT_BF16)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return device.type == "cpu" or bool(getattr(_module(device), "is_bf16_supported", lambda: False)())


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds the random numbers of the CPU and of `device` within the block, and restores both after it.

    torch.random.fork_rng copies the state of every GPU of the machine, and knows no other accelerators.
    """
    module = _module(device)
    chosen = () if device.type == "mps" else (device,)  # torch.mps has one device and takes no argument
    state = module.get_rng_state(*chosen) if module else None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            if module:
                module.manual_seed(seed)
            yield
        finally:
            if state is not None:
                module.set_rng_state(state, *chosen)


def _module(device: torch.device) -> Any:
    """torch's module for the type of the device; None for the CPU, and for DirectML, which has none."""
    try:
        return None if device.type == "cpu" else torch.get_device_module(device)
    except RuntimeError:
        return None
