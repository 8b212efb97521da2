"""Where an adapter's matrices start, other than at random: at the base's principal parts, or at another file."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...lora.modules import AdapterModule, LoRAFile, LoRAModule, with_magnitude
from ...sdxl.loading import ENCODERS, Part
from ..config.captions import tokens_of
from ..config.train_config import TrainConfig

log = logging.getLogger("sdxl_lora")

PISSA = "pissa_niter_16"  # peft's name of the fast decomposition; a full one of every layer takes hours


def start_at_principal_parts(layers: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """PiSSA, Meng et al., arXiv 2404.02948: moves the largest singular parts of each weight into its LoRA.

    Returns down and up of each layer as they start, on the CPU: what is learned is the change since. Draws from the
    global random state. Raises ValueError where a weight has fewer singular parts than the rank.
    """
    first = {}
    for name, layer in layers.items():
        rank, weight = layer.r["default"], layer.base_layer.weight
        if rank > min(weight.shape):
            raise ValueError(
                f"rank is {rank} and init is pissa: {name} of shape {list(weight.shape)} has {min(weight.shape)} "
                f"singular parts; take a rank up to {min(weight.shape)}, or init kaiming"
            )
        layer.pissa_init("default", PISSA)
        first[name] = (
            layer.lora_A["default"].weight.detach().to("cpu", copy=True),
            layer.lora_B["default"].weight.detach().to("cpu", copy=True),
        )
    return first


def require_same_parts(file: LoRAFile, config: TrainConfig, encoders: Sequence[Part]) -> None:
    """Raises ValueError if the file of `continue_from` changes a part that this run leaves alone, or has other tokens.

    `encoders` are the text encoders that learn by themselves.
    """
    name = Path(config.continue_from).name
    learns = {"unet": config.train_unet} | {part: part in encoders for part in ENCODERS}
    for part, modules in file.parts().items():
        if modules and not learns[part]:
            remedy = "turn train_unet on" if part == "unet" else f"set {part}_learning_rate"
            raise ValueError(f"continue_from is {name}, which changes the {part}, and here it does not learn: {remedy}")
    wanted = dict.fromkeys(tokens_of(config), config.vectors_per_token)
    found = {token: len(next(iter(vectors.values()))) for token, vectors in file.tokens.items()}
    if found != wanted:
        raise ValueError(
            f"continue_from is {name} with the new tokens {_named(found)}, and here they are {_named(wanted)}: "
            "take the file's new_tokens and vectors_per_token"
        )


def _named(tokens: Mapping[str, int]) -> str:
    return ", ".join(f"{token} of {count} vectors" for token, count in tokens.items()) or "none"


@torch.no_grad()
def continue_from(file: LoRAFile, config: TrainConfig, part: Part, layers: Mapping[str, Any]) -> None:
    """Puts the matrices of the file into the layers of `part`, scaled so that they act as they do in the file.

    Raises ValueError for a file of another kind, of other layers or of another rank, naming what differs.
    """
    name, modules = Path(config.continue_from).name, file.parts()[part]
    if not modules:
        log.info("%s leaves the %s as it is, so that starts anew", name, part)
        return
    _require_same_layers(name, config, modules, layers)
    for path, layer in layers.items():
        module = modules[path]
        where = f"continue_from is {name}, whose {path}"
        kind = "dora" if isinstance(module, LoRAModule) and module.is_dora else module.kind.lower()
        if kind != config.adapter:
            raise ValueError(f"{where} is a {kind}, and adapter is {config.adapter}: take adapter {kind}")
        weight, parameters = layer.base_layer.weight, _parameters(layer)
        sizes = {key: parameter.numel() for key, parameter in parameters.items()}
        alike = prod(module.shape) == weight.numel()
        values = _start_values(module, layer.scaling["default"], weight) if alike else {}
        if not values or any(tensor.numel() != sizes.get(key) for key, tensor in values.items()):
            raise ValueError(
                f"{where} has rank {module.rank or 'full'} for a weight of shape {list(module.shape)}; here it is "
                f"{layer.r['default']}, for {list(weight.shape)}: "
                "take the file's rank and block_ranks, or the base it was made for"
            )
        for key, tensor in values.items():
            parameters[key].copy_(tensor.reshape(parameters[key].shape))


def _require_same_layers(name: str, config: TrainConfig, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differing = sorted(found.keys() ^ wanted.keys())
    if differing:
        owner = "the file" if differing[0] in found else "this run"
        raise ValueError(
            f"continue_from is {name} with {len(found)} layers, and target_modules {config.target_modules} with blocks "
            f"{config.blocks or 'all'} has {len(wanted)}; only {owner} has {differing[0]}: "
            "choose the target_modules and blocks that the file was trained with"
        )


def _parameters(layer: Any) -> dict[str, Tensor]:
    """The layer's trained tensors by the names of peft's lists: lora_A, lora_B, hada_w1_a, ..."""
    return {key.split(".")[0]: tensor for key, tensor in layer.named_parameters() if tensor.requires_grad}


def _start_values(module: AdapterModule, scale: float, weight: Tensor) -> dict[str, Tensor]:
    """Tensors by peft's names, so that `scale` times their product is the module's change of `weight`."""
    factor = module.scale / scale
    if isinstance(module, LoRAModule):
        values = {"lora_A": module.down.float(), "lora_B": module.up.float() * factor}
        lengths = with_magnitude(module, weight).magnitude
        return values if lengths is None else {**values, "lora_magnitude_vector": lengths.float()}
    values = {name: tensor.float() for name, tensor in module.factors.items()}
    one = next(iter(values))  # the change is linear in each factor
    return {**values, one: values[one] * factor}
