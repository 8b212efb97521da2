"""Creates the optimizer and sets its learning rates."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..config.optimizer import Optimizer
from ..config.train_config import TrainConfig
from ..model.adapters import ParameterGroup

CLASSES: dict[Optimizer, str] = {
    "adamw": "torch.optim.AdamW",
    "adamw_fused": "torch.optim.AdamW",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "adafactor": "pytorch_optimizer.AdaFactor",
    "lion": "pytorch_optimizer.Lion",
    "prodigy": "pytorch_optimizer.Prodigy",
    "came": "pytorch_optimizer.CAME",
    "schedule_free": "pytorch_optimizer.ScheduleFreeAdamW",
}
_PIP = {"pytorch_optimizer": "pytorch-optimizer", "bitsandbytes": "bitsandbytes"}


def optimizer_settings(config: TrainConfig) -> dict[str, Any]:
    """The arguments of the optimizer's class except the learning rate.

    AdamW: Loshchilov and Hutter, arXiv 1711.05101; 8-bit: Dettmers et al., 2110.02861. Adafactor: Shazeer and Stern,
    1804.04235, without momentum and at the run's own learning rate. Lion: Chen et al., 2302.06675. Prodigy: Mishchenko
    and Defazio, 2306.06101, as its authors recommend for diffusion. CAME: Luo et al., 2307.02047. Schedule-free:
    Defazio et al., 2405.15682.
    """
    betas = (config.adam_beta1, config.adam_beta2)
    own: dict[Optimizer, dict[str, Any]] = {
        "adamw_fused": {"fused": True},
        "adafactor": {"betas": (None, config.adam_beta2), "relative_step": False, "scale_parameter": False},
        "lion": {"betas": (config.adam_beta1, 0.99)},
        "prodigy": {"bias_correction": True, "safeguard_warmup": True},
        "came": {"betas": (*betas, 0.9999)},
    }
    return {"betas": betas, "weight_decay": config.weight_decay, **own.get(config.optimizer, {})}


def require_library(config: TrainConfig) -> None:
    """Raises ValueError with the pip command if the optimizer's library is not installed. Imports nothing."""
    library = CLASSES[config.optimizer].partition(".")[0]
    if importlib.util.find_spec(library) is None:
        raise ValueError(
            f"optimizer is {config.optimizer!r}, whose library is not installed: "
            f"python -m pip install {_PIP[library]}, or choose adamw"
        )


def state_copies(config: TrainConfig) -> int:
    """The maximum size of the optimizer's state in multiples of the parameters' size."""
    return 4 if config.optimizer == "prodigy" else 2


def make_optimizer(groups: Sequence[ParameterGroup], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of `config` with one parameter group for each of `groups`, in their order.

    Raises ValueError if the device has no fused AdamW, and for several rates with Prodigy, which finds one for all.
    """
    factors = {group.rate_factor for group in groups}
    if config.optimizer == "prodigy" and len(factors) > 1:
        raise ValueError(
            f"optimizer is 'prodigy', which finds one learning rate for all, and the adapter's settings give "
            f"{len(factors)} different ones: choose another optimizer, or make the learning rates equal"
        )
    if config.optimizer == "adamw_fused":
        _require_fused(groups[0].parameters[0].device)
    module, _, name = CLASSES[config.optimizer].rpartition(".")
    make = getattr(importlib.import_module(module), name)
    parameters = [{"params": group.parameters} for group in groups]
    return make(parameters, lr=config.leading_rate, **optimizer_settings(config))


@contextmanager
def state_on_cpu(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Moves the optimizer's state to main memory within the block."""
    moved = [
        (state, name, value.device)
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, Tensor) and value.device.type != "cpu"
    ]
    for state, name, _ in moved:
        state[name] = state[name].to("cpu")
    try:
        yield
    finally:
        for state, name, device in moved:
            state[name] = state[name].to(device)


def _require_fused(device: torch.device) -> None:
    """Takes a step with a dummy parameter: torch raises the error only in the first step."""
    probe = nn.Parameter(torch.zeros(1, device=device))
    probe.grad = torch.zeros_like(probe)
    try:
        torch.optim.AdamW([probe], fused=True).step()
    except RuntimeError as error:
        raise ValueError(f"optimizer is 'adamw_fused', which {device.type} does not support: choose adamw") from error


def set_learning_rates(optimizer: torch.optim.Optimizer, groups: Sequence[ParameterGroup], rate: float) -> None:
    """Sets the learning rate of each group to `rate` times its factor."""
    for settings, group in zip(optimizer.param_groups, groups, strict=True):
        settings["lr"] = rate * group.rate_factor
