"""Safetensors files: their header, equal bytes for equal content, and a clear word about everything else."""

from __future__ import annotations

import torch

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}  # by the name that settings give
