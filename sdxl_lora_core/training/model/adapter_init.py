"""Initial values of adapters other than random ones: PiSSA, and the LoRA file of `continue_from`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...lora.modules import AdapterModule, LoRAFile, LoRAModule, with_magnitude
from ...sdxl.family import ENCODERS, Part
from ..config.captions import tokens_of
from ..config.train_config import TrainConfig

log = logging.getLogger("sdxl_lora")

PISSA = "pissa_niter_16"  # peft's name of the fast decomposition; a full one of every layer takes hours


def pissa_init(layers: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """PiSSA (Meng et al., arXiv 2404.02948): moves the principal components of each weight into its LoRA.

    Returns the initial down and up matrices of each layer on the CPU: the trained change is the difference from them.
    Uses the global random state. Raises ValueError if the rank is larger than that of a weight.
    """
    first = {}
    for name, layer in layers.items():
        rank, weight = layer.r["default"], layer.base_layer.weight
        if rank > min(weight.shape):
            raise ValueError(
                f"rank is {rank} and init is pissa: {name} of shape {list(weight.shape)} has {min(weight.shape)} "
                f"singular values; set rank to at most {min(weight.shape)}, or init to kaiming"
            )
        layer.pissa_init("default", PISSA)
        first[name] = (
            layer.lora_A["default"].weight.detach().to("cpu", copy=True),
            layer.lora_B["default"].weight.detach().to("cpu", copy=True),
        )
    return first


def require_same_parts(file: LoRAFile, config: TrainConfig, encoders: Sequence[Part]) -> None:
    """Raises ValueError if the file of `continue_from` changes parts that this run does not train, or has other tokens.

    `encoders` are the text encoders that have an adapter.
    """
    name = Path(config.continue_from).name
    trains = {"unet": config.train_unet} | {part: part in encoders for part in ENCODERS}
    for part, modules in file.parts().items():
        if modules and not trains[part]:
            remedy = "turn train_unet on" if part == "unet" else f"set {part}_learning_rate"
            raise ValueError(
                f"continue_from is {name}, which changes the {part}, and this run does not train it: {remedy}"
            )
    wanted = dict.fromkeys(tokens_of(config), config.vectors_per_token)
    found = {token: len(next(iter(vectors.values()))) for token, vectors in file.tokens.items()}
    if found != wanted:
        raise ValueError(
            f"continue_from is {name} with the new tokens {_named(found)}, and this run has {_named(wanted)}: "
            "use the file's new_tokens and vectors_per_token"
        )


def _named(tokens: Mapping[str, int]) -> str:
    return ", ".join(f"{token} with {count} vectors" for token, count in tokens.items()) or "none"


@torch.no_grad()
def continue_from(file: LoRAFile, config: TrainConfig, part: Part, layers: Mapping[str, Any]) -> None:
    """Copies the matrices of the file to the layers of `part`, scaled for the same effect as in the file.

    Raises ValueError if the file's kind of adapter, layers or ranks differ from those of the run.
    """
    name, modules = Path(config.continue_from).name, file.parts()[part]
    if not modules:
        log.info("%s does not change the %s, whose adapter starts at its usual initial values", name, part)
        return
    _require_same_layers(name, config, modules, layers)
    for path, layer in layers.items():
        module = modules[path]
        where = f"continue_from is {name}, whose {path}"
        kind = "dora" if isinstance(module, LoRAModule) and module.is_dora else module.kind.lower()
        if kind != config.adapter:
            raise ValueError(f"{where} is a {kind}, and adapter is {config.adapter}: set adapter to {kind}")
        weight, parameters = layer.base_layer.weight, _parameters(layer)
        sizes = {key: parameter.numel() for key, parameter in parameters.items()}
        alike = prod(module.shape) == weight.numel()
        values = _start_values(module, layer.scaling["default"], weight) if alike else {}
        if not values or any(tensor.numel() != sizes.get(key) for key, tensor in values.items()):
            raise ValueError(
                f"{where} has rank {module.rank or 'full'} for a weight of shape {list(module.shape)}; in this "
                f"run it is {layer.r['default']}, for {list(weight.shape)}: "
                "use the file's rank and block_ranks, or the base it was made for"
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
    """The trainable tensors of a layer by peft's names: lora_A, lora_B, hada_w1_a and so on."""
    return {key.split(".")[0]: tensor for key, tensor in layer.named_parameters() if tensor.requires_grad}


def _start_values(module: AdapterModule, scale: float, weight: Tensor) -> dict[str, Tensor]:
    """The tensors of `module` by peft's names, such that `scale` times their product is its change of `weight`."""
    factor = module.scale / scale
    if isinstance(module, LoRAModule):
        values = {"lora_A": module.down.float(), "lora_B": module.up.float() * factor}
        magnitude = with_magnitude(module, weight).magnitude
        return values if magnitude is None else {**values, "lora_magnitude_vector": magnitude.float()}
    values = {name: tensor.float() for name, tensor in module.factors.items()}
    one = next(iter(values))  # the change is linear in each factor
    return {**values, one: values[one] * factor}
