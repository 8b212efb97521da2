"""Dtypes by their names in settings."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from ..runtime.device import has_bf16

Precision = Literal["auto", "bf16", "fp16", "fp32"]
WeightType = Literal["fp16", "bf16", "fp32"]
PRECISIONS = get_args(Precision)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def resolve_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype to compute in. auto: fp32 on the CPU, bf16 on other devices that support it, else fp16.

    On MPS, fp16 attention overflows, which makes black images. Raises ValueError for bf16 where it is not supported.
    """
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else "bf16" if has_bf16(device) else "fp16"
    if precision == "bf16" and not has_bf16(device):
        raise ValueError("precision is 'bf16', which this GPU does not support: choose 'fp16' or 'auto'")
    return DTYPES[precision]
