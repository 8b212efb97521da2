"""Splits an optimizer's state into named tensors (safetensors) and a JSON structure that refers to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...runtime.device import copied_to_cpu


def split_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Any]:
    """Copies of the state's tensors on the CPU, and the structure as JSON.

    Raises TypeError for a value that JSON cannot represent.
    """
    tensors: dict[str, Tensor] = {}  # by name, on the device

    def plan_of(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value
            return {"tensor": name}
        if isinstance(value, dict):  # as pairs, because JSON would turn the numbers of parameters into strings
            return {"dict": [[key, plan_of(item, f"{name}.{key}")] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [plan_of(item, f"{name}.{number}") for number, item in enumerate(value)]}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"{type(optimizer).__name__} keeps a {type(value).__name__} in {name}: no form to save it in")

    plan = plan_of(optimizer.state_dict(), "optimizer")
    return dict(zip(tensors, copied_to_cpu(list(tensors.values())), strict=True)), plan


def restore_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], plan: Any) -> None:
    """Gives the optimizer the state that `split_state` took."""

    def value_of(plan: Any) -> Any:
        if not isinstance(plan, dict):
            return plan
        ((kind, content),) = plan.items()
        if kind == "tensor":
            return tensors[content].clone()  # else the state would keep a mapping of the file open
        if kind == "dict":
            return {key: value_of(item) for key, item in content}
        return (tuple if kind == "tuple" else list)(value_of(item) for item in content)

    state = value_of(plan)
    for group, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        if "fused" in group:
            group["fused"] = own["fused"]  # of this device, not of the one that the state was saved on
    optimizer.load_state_dict(state)
