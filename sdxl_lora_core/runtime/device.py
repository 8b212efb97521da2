"""Memory of the compute device: how much is free, how much is in use, and releasing it."""

from __future__ import annotations

import gc

import torch


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    import psutil

    return psutil.virtual_memory().available


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out. CUDA raises a class of its own; cuBLAS, cuDNN and MPS only say so in the message."""
    words = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def release_memory(device: torch.device) -> None:
    """Frees unreachable objects and returns torch's unused cached memory to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def memory_in_use(device: torch.device) -> int:
    """Bytes in use: on CUDA torch's peak since the run began, elsewhere the present resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import psutil

    return psutil.Process().memory_info().rss
