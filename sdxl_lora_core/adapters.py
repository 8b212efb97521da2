"""LoRA on the UNet through peft (Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .lora_files import LoRAModule
from .train_config import TrainConfig

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
_TRANSFORMERS = (*_ATTENTION, *_FEED_FORWARD, "proj_in", "proj_out")
_RESNETS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv")
PRESETS: dict[str, tuple[str, ...]] = {
    "attention": _ATTENTION,
    "attention+ff": _ATTENTION + _FEED_FORWARD,
    "all-linear": _TRANSFORMERS,
    "all-linear+conv": _TRANSFORMERS + _RESNETS,
}


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters, float32, in a fixed order, that learn at `rate_factor` times the run's learning rate."""

    parameters: list[nn.Parameter]
    rate_factor: float = 1.0


def add_lora(unet: Any, config: TrainConfig) -> list[ParameterGroup]:
    """Puts a LoRA on the modules of `config.target_modules` and returns its parameters.

    `down` starts at random from `config.seed`, `up` at zero, so that training starts at the base itself.
    """
    from peft import LoraConfig

    adapter = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft says int, and divides it as a float
        lora_dropout=config.dropout,
        target_modules=list(PRESETS[config.target_modules]),
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        unet.add_adapter(adapter)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return [ParameterGroup(parameters)]


def lora_modules(unet: Any, alpha: float) -> dict[str, LoRAModule]:
    """The adapter's matrices by the diffusers name of the module they sit on, copied to the CPU."""
    modules = {}
    for name, module in unet.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
            modules[name] = LoRAModule(down=_copy(down), up=_copy(up), alpha=alpha)
    return modules


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
