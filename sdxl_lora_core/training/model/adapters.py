"""Adapters on the UNet and the text encoders, by peft.

LoRA, arXiv 2106.09685; DoRA, 2402.09353; LoHa, 2108.06098; LoKr, 2309.14859; rsLoRA, 2312.03732; LoRA+, 2402.12354.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...lora.modules import AdapterModule, LoHaModule, LoKrModule, LoRAFile, LoRAModule, with_dora_scale
from ...runtime.device import copied_to_cpu, seeded
from ...sdxl.blocks import read_block_values, read_blocks, value_for
from ...sdxl.family import Part
from ..config.adapter import encoder_rate
from ..config.train_config import TrainConfig
from .adapter_init import continue_from, pissa_init
from .flat_parameters import FlatParameters, ParameterGroup
from .lora_linear import fuse, fused_scales

Copies = Mapping[Tensor, Tensor]  # of trained parameters, on the CPU

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
_TRANSFORMERS = (*_ATTENTION, *_FEED_FORWARD, "proj_in", "proj_out")
_TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
_RESNETS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv")
TARGETS: dict[str, tuple[str, ...]] = {
    "attention": _ATTENTION,
    "attention+ff": _ATTENTION + _FEED_FORWARD,
    "all-linear": _TRANSFORMERS,
    "all-linear+conv": _TRANSFORMERS + _RESNETS,
}


class Adapter:
    """The adapter of `config` on one part of SDXL, added in place. `layers` are peft's layers by diffusers' names.

    Initially it has no effect, or that of `start`. Random initial values depend on `config.seed` only; those of PiSSA
    also on the device.
    Raises ValueError if `start`, or the rank of PiSSA, does not fit.
    """

    def __init__(self, model: Any, config: TrainConfig, part: Part = "unet", start: LoRAFile | None = None) -> None:
        self.config = config
        # transformers 5.24's own add_adapter refuses peft 0.21, which was the newest one then.
        from peft import inject_adapter_in_model

        with seeded(config.seed, model.device):
            inject_adapter_in_model(_peft_config(config, part), model, "default")
            self.layers = {
                _file_path(name, part): layer for name, layer in model.named_modules() if hasattr(layer, "base_layer")
            }
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
            self.first = pissa_init(self.layers) if config.init == "pissa" else {}
        if config.adapter == "dora":
            _update_magnitudes(self.layers)
        if start:
            continue_from(start, config, part, self.layers)
        self.groups = _groups(self.layers, config, part)
        self.model = model
        self.is_fused = config.adapter == "lora" and config.dropout == 0

    @property
    def scales(self) -> dict[nn.Parameter, float]:
        """The parameters of the layers that `fuse` replaces, for FlatParameters."""
        return fused_scales(self.layers.values()) if self.is_fused else {}

    def fuse(self, flat: FlatParameters) -> None:
        """Replaces peft's computation by that of lora_linear where that has one: LoRA on linear layers."""
        if self.is_fused:
            fuse(self.model, self.layers.values(), flat)

    def modules(self) -> dict[str, AdapterModule]:
        """The change of the original weights by diffusers' names, copied to the CPU, for a LoRA file."""
        read = {"loha": self._loha, "lokr": self._lokr}.get(self.config.adapter, self._lora)
        parameters = [parameter for group in self.groups for parameter in group.parameters]
        copies = dict(zip(parameters, copied_to_cpu(parameters), strict=True))
        return {name: read(name, layer, copies) for name, layer in self.layers.items()}

    def _lora(self, name: str, layer: Any, copies: Copies) -> LoRAModule:
        """rsLoRA's scale alpha / sqrt(rank) is alpha * sqrt(rank) / rank. PiSSA's initial product is subtracted."""
        down, up = copies[layer.lora_A["default"].weight], copies[layer.lora_B["default"].weight]
        alpha = layer.lora_alpha["default"] * (math.sqrt(down.shape[0]) if self.config.use_rslora else 1.0)
        if name in self.first:
            first_down, first_up = self.first[name]
            down, up, alpha = torch.cat([down, first_down]), torch.cat([up, -first_up], dim=1), 2 * alpha
        if self.config.adapter == "lora":
            return LoRAModule(down, up, alpha)
        magnitude = copies[layer.lora_magnitude_vector["default"].weight].reshape(-1, *[1] * (down.dim() - 1))
        module = LoRAModule(down, up, alpha, magnitude=magnitude)
        return module if self.config.save_format == "peft" else with_dora_scale(module, self._base(name, layer))

    def _base(self, name: str, layer: Any) -> Tensor:
        """The weight before PiSSA subtracted its principal components."""
        weight = layer.base_layer.weight.detach()
        if name not in self.first:
            return weight
        down, up = (factor.to(weight.device) for factor in self.first[name])
        return weight + layer.scaling["default"] * up @ down

    def _loha(self, name: str, layer: Any, copies: Copies) -> LoHaModule:
        return LoHaModule(_factors(layer, copies), layer.alpha["default"])

    def _lokr(self, name: str, layer: Any, copies: Copies) -> LoKrModule:
        """Files have no scale if neither matrix is factored, so the first one is multiplied by it."""
        module = LoKrModule(_factors(layer, copies), layer.alpha["default"])
        if module.rank:
            return module
        first = module.factors["lokr_w1"] * layer.scaling["default"]
        return LoKrModule({**module.factors, "lokr_w1": first}, 1.0)


def _file_path(name: str, part: Part) -> str:
    """CLIP's text model is in `text_model` or, from transformers 5.6 on, is the part itself; files have the prefix."""
    return name if part == "unet" or name.startswith("text_model.") else f"text_model.{name}"


def _peft_config(config: TrainConfig, part: Part) -> Any:
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    ranks = read_block_values("block_ranks", config.block_ranks, 1, math.inf) if part == "unet" else {}
    common: dict[str, Any] = {
        "r": config.rank,
        "target_modules": _target_pattern(config) if part == "unet" else _text_pattern(config),
        "rank_pattern": {_inside(block): int(rank) for block, rank in ranks.items()},
        "alpha_pattern": {_inside(block): config.alpha * rank / config.rank for block, rank in ranks.items()},
    }
    if config.adapter in ("loha", "lokr"):
        kind: Any = LoHaConfig if config.adapter == "loha" else LoKrConfig
        drops = {"rank_dropout": config.rank_dropout, "module_dropout": config.module_dropout}
        return kind(alpha=config.alpha, **drops, **common)
    return LoraConfig(
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # annotated as int in peft, used as a float
        lora_dropout=config.dropout,
        use_rslora=config.use_rslora,
        use_dora=config.adapter == "dora",
        init_lora_weights="gaussian" if config.init == "gaussian" else True,
        **common,
    )


def _target_pattern(config: TrainConfig) -> str:
    """A pattern for full module names: the layers of `target_modules` within `config.blocks`."""
    ends = "|".join(map(re.escape, TARGETS[config.target_modules]))
    blocks = "|".join(map(re.escape, read_blocks("blocks", config.blocks)))
    return rf"(?:{blocks})\.(?:.*\.)?(?:{ends})" if blocks else rf"(?:.*\.)?(?:{ends})"


def _text_pattern(config: TrainConfig) -> str:
    """Text encoders have attention and feed-forward layers only; other layers of `target_modules` do not apply."""
    feed_forward = () if config.target_modules == "attention" else ("fc1", "fc2")
    return rf".*\.(?:{'|'.join((*_TEXT_ATTENTION, *feed_forward))})"


def _inside(block: str) -> str:
    return rf"{re.escape(block)}\..*"


def _update_magnitudes(layers: dict[str, Any]) -> None:
    """Computes DoRA's magnitudes again in float32: peft rounds them to the base's dtype, which changes the output."""
    for layer in layers.values():
        layer.lora_magnitude_vector["default"].update_layer(
            base_layer=layer.base_layer,
            lora_A=layer.lora_A["default"].weight,
            lora_B=layer.lora_B["default"].weight,
            scaling=layer.scaling["default"],
        )


def _groups(layers: dict[str, Any], config: TrainConfig, part: Part) -> list[ParameterGroup]:
    """One group for each learning rate; a single group without block_learning_rates and LoRA+.

    In a group all down matrices come first, so that those of layers that read the same input are adjacent.
    """
    blocks = config.block_learning_rates if part == "unet" else ""
    rates = read_block_values("block_learning_rates", blocks, 0, math.inf)
    of_part = (config.learning_rate if part == "unet" else encoder_rate(config, part)) / config.leading_rate
    groups: dict[float, list[nn.Parameter]] = {}
    trained = [
        (name, key, parameter)
        for name, layer in layers.items()
        for key, parameter in layer.named_parameters()
        if parameter.requires_grad
    ]
    for name, key, parameter in sorted(trained, key=lambda item: not item[1].startswith("lora_A")):
        factor = config.lora_plus_ratio if key.startswith("lora_B") else 1.0
        groups.setdefault(of_part * value_for(name, rates, 1.0) * factor, []).append(parameter)
    return [ParameterGroup(parameters, factor) for factor, parameters in groups.items()]


def _factors(layer: Any, copies: Copies) -> dict[str, Tensor]:
    """The factors of a LoHa or LoKr layer; peft's names are LyCORIS'."""
    names = (name for name in layer.adapter_layer_names if "default" in getattr(layer, name))
    return {name: copies[getattr(layer, name)["default"]] for name in names}
