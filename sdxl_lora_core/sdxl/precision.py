"""Dtypes by their names in settings."""

from __future__ import annotations

from typing import Literal, get_args

import torch

Precision = Literal["auto", "bf16", "fp16", "fp32"]
WeightType = Literal["fp16", "bf16", "fp32"]
PRECISIONS = get_args(Precision)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def resolve_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype to compute in. auto: bf16 on CUDA GPUs that support it, fp16 on others and on MPS, fp32 on the CPU.

    Raises ValueError for bf16 on a CUDA GPU that does not support it.
    """
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else "bf16" if has_bf16 else "fp16"
    if precision == "bf16" and device.type == "cuda" and not has_bf16:
        raise ValueError("precision is 'bf16', which this GPU does not support: choose 'fp16' or 'auto'")
    return DTYPES[precision]
