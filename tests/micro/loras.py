"""What the tests of LoRA files share: modules of the micro model, random changes of them, and comparing effects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sdxl_lora_core.lora.modules import LoRAFile, LoRAModule
from sdxl_lora_core.sdxl.base import SDXLBase, load_part

Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "mid_block.attentions.0.transformer_blocks.1.attn2.to_out.0"
CONV = "up_blocks.0.resnets.1.conv1"
SHORTCUT = "up_blocks.1.resnets.0.conv_shortcut"
TEXT = "text_model.encoder.layers.1.self_attn.q_proj"
MLP = "text_model.encoder.layers.0.mlp.fc1"
UNET_MODULES = (Q, OUT, CONV, SHORTCUT, "down_blocks.2.attentions.1.transformer_blocks.0.ff.net.0.proj")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def random_lora(part: nn.Module, names: tuple[str, ...], rank: int = 3, alpha: float = 6.0) -> dict[str, LoRAModule]:
    generator = torch.Generator().manual_seed(rank)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    modules = {}
    for name in names:
        weight = find(part, name).weight
        ones = [1] * (weight.dim() - 2)
        modules[name] = LoRAModule(random(rank, *weight.shape[1:]), random(weight.shape[0], rank, *ones), alpha)
    return modules


def find(part: nn.Module, name: str) -> Any:
    return part.get_submodule(name if hasattr(part, "text_model") else name.removeprefix("text_model."))


def change(module: LoRAModule) -> Tensor:
    return (module.up.float().flatten(1) @ module.down.float().flatten(1)) * (module.alpha / module.rank)


def same_effect(one: Mapping[str, LoRAModule], other: Mapping[str, LoRAModule], tolerance: float = 1e-7) -> bool:
    pairs = [(change(one[name]), change(other[name])) for name in one]
    return one.keys() == other.keys() and all(torch.allclose(a, b, atol=tolerance) for a, b in pairs)


def load_parts(base: SDXLBase) -> dict[str, Any]:
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: load_part(base, name, torch.float32) for name in names}  # type: ignore[arg-type]


def some_modules(parts: dict[str, Any]) -> LoRAFile:
    """Linear layers, a convolution and a 1x1 convolution, with ranks and alphas of each part's own."""
    return LoRAFile(
        unet=random_lora(parts["unet"], UNET_MODULES),
        text_encoder=random_lora(parts["text_encoder"], (TEXT, MLP), rank=2, alpha=1.0),
        text_encoder_2=random_lora(parts["text_encoder_2"], (TEXT, MLP), rank=4, alpha=4.0),
    )
