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
from ..model.flat_parameters import ParameterGroup

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
# Their update of an element depends on that element only, so that they can update flat buffers.
ELEMENTWISE: tuple[Optimizer, ...] = ("adamw", "adamw_fused", "lion")
_PIP = {"pytorch_optimizer": "pytorch-optimizer", "bitsandbytes": "bitsandbytes"}


def optimizer_settings(config: TrainConfig) -> dict[str, Any]:
    """The arguments of the optimizer's class except the learning rate, and whether AdamW is fused.

    AdamW: Loshchilov and Hutter, arXiv 1711.05101; 8-bit: Dettmers et al., 2110.02861. Adafactor: Shazeer and Stern,
    1804.04235, without momentum and at the run's own learning rate. Lion: Chen et al., 2302.06675. Prodigy: Mishchenko
    and Defazio, 2306.06101, as its authors recommend for diffusion. CAME: Luo et al., 2307.02047. Schedule-free:
    Defazio et al., 2405.15682.
    """
    betas = (config.adam_beta1, config.adam_beta2)
    own: dict[Optimizer, dict[str, Any]] = {
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
    settings = optimizer_settings(config)
    if CLASSES[config.optimizer] == CLASSES["adamw"]:
        settings["fused"] = _fused(config.optimizer, groups[0].parameters[0].device)
    module, _, name = CLASSES[config.optimizer].rpartition(".")
    make = getattr(importlib.import_module(module), name)
    parameters = [{"params": group.parameters} for group in groups]
    return make(parameters, lr=config.leading_rate, **settings)


def can_be_masked(optimizer: Any) -> bool:
    """Whether `masked_step` can skip an update without a wait for the device: fused AdamW and Lion."""
    return bool(optimizer.defaults.get("fused")) or type(optimizer).__name__ == "Lion"


@torch.no_grad()
def masked_step(optimizer: Any, is_finite: Tensor) -> None:
    """Takes a step where `is_finite`, a bool [] on the device, is true; otherwise nothing changes, not even moments.

    The fused AdamW reads the flag in its kernel, as with a GradScaler. Lion's result is discarded.
    """
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = (~is_finite).float()
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [(parameter.clone(), _moment(optimizer, parameter).clone()) for parameter in parameters]
    optimizer.step()
    for parameter, (value, moment) in zip(parameters, kept, strict=True):
        parameter.copy_(torch.where(is_finite, parameter, value))
        state = optimizer.state[parameter]
        state["exp_avg"] = torch.where(is_finite, state["exp_avg"], moment)


def _moment(optimizer: Any, parameter: Tensor) -> Tensor:
    """Lion's moment, zero before the first step."""
    return optimizer.state[parameter].get("exp_avg", torch.zeros_like(parameter))


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


def _fused(optimizer: Optimizer, device: torch.device) -> bool:
    """Whether the device has the fused AdamW. Raises ValueError if it has not and the optimizer is adamw_fused.

    Takes a step with a dummy parameter: torch raises the error only in the first step.
    """
    probe = nn.Parameter(torch.zeros(1, device=device))
    probe.grad = torch.zeros_like(probe)
    try:
        torch.optim.AdamW([probe], fused=True).step()
    except RuntimeError as error:
        if optimizer == "adamw_fused":
            raise ValueError(
                f"optimizer is {optimizer!r}, which {device.type} does not support: choose adamw"
            ) from error
        return False
    return True


def set_learning_rates(optimizer: torch.optim.Optimizer, groups: Sequence[ParameterGroup], rate: float) -> None:
    """Sets the learning rate of each group to `rate` times its factor."""
    for settings, group in zip(optimizer.param_groups, groups, strict=True):
        settings["lr"] = rate * group.rate_factor
