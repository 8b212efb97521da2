from collections.abc import Callable
from typing import Any

import torch
from torch import nn

class CallbacksMP:
    ON_DETACH: str

class ModelPatcher:
    model: Any  # a module with whatever attributes it has

    def __init__(self, model: nn.Module, load_device: torch.device, offload_device: torch.device) -> None: ...
    def add_callback(self, call_type: str, callback: Callable[..., None]) -> None: ...
    def detach(self, unpatch_all: bool = True) -> nn.Module: ...
    def partially_unload(self, device_to: torch.device, memory_to_free: int = 0) -> int: ...
    def model_size(self) -> int: ...
