"""SDXL with every module that the real one has, and a few channels in each: LoRAs for it have the full set of keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sdxl_lora_core.sdxl.base import CONFIGS
from tests.conftest import MICRO_TEXT, MICRO_TEXT_2, MICRO_UNET, sdxl_config

PARTS = ("unet", "text_encoder", "text_encoder_2")
RANK = 2

# SAI's transformers and resnets, diffusers' names for them, and the depth of a transformer: written by hand.
TRANSFORMERS = (
    ("input_blocks_4_1", "down_blocks.1.attentions.0", 2),
    ("input_blocks_5_1", "down_blocks.1.attentions.1", 2),
    ("input_blocks_7_1", "down_blocks.2.attentions.0", 10),
    ("input_blocks_8_1", "down_blocks.2.attentions.1", 10),
    ("middle_block_1", "mid_block.attentions.0", 10),
    ("output_blocks_0_1", "up_blocks.0.attentions.0", 10),
    ("output_blocks_1_1", "up_blocks.0.attentions.1", 10),
    ("output_blocks_2_1", "up_blocks.0.attentions.2", 10),
    ("output_blocks_3_1", "up_blocks.1.attentions.0", 2),
    ("output_blocks_4_1", "up_blocks.1.attentions.1", 2),
    ("output_blocks_5_1", "up_blocks.1.attentions.2", 2),
)
RESNETS = (
    ("input_blocks_1_0", "down_blocks.0.resnets.0"),
    ("input_blocks_2_0", "down_blocks.0.resnets.1"),
    ("input_blocks_4_0", "down_blocks.1.resnets.0"),
    ("input_blocks_5_0", "down_blocks.1.resnets.1"),
    ("input_blocks_7_0", "down_blocks.2.resnets.0"),
    ("input_blocks_8_0", "down_blocks.2.resnets.1"),
    ("middle_block_0", "mid_block.resnets.0"),
    ("middle_block_2", "mid_block.resnets.1"),
    ("output_blocks_0_0", "up_blocks.0.resnets.0"),
    ("output_blocks_1_0", "up_blocks.0.resnets.1"),
    ("output_blocks_2_0", "up_blocks.0.resnets.2"),
    ("output_blocks_3_0", "up_blocks.1.resnets.0"),
    ("output_blocks_4_0", "up_blocks.1.resnets.1"),
    ("output_blocks_5_0", "up_blocks.1.resnets.2"),
    ("output_blocks_6_0", "up_blocks.2.resnets.0"),
    ("output_blocks_7_0", "up_blocks.2.resnets.1"),
    ("output_blocks_8_0", "up_blocks.2.resnets.2"),
)
SAMPLERS = (
    ("input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
    ("input_blocks_6_0_op", "down_blocks.1.downsamplers.0.conv"),
    ("output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
    ("output_blocks_5_2_conv", "up_blocks.1.upsamplers.0.conv"),
)
OUTSIDE = (
    ("input_blocks_0_0", "conv_in"),
    ("out_2", "conv_out"),
    ("time_embed_0", "time_embedding.linear_1"),
    ("time_embed_2", "time_embedding.linear_2"),
    ("label_emb_0_0", "add_embedding.linear_1"),
    ("label_emb_0_2", "add_embedding.linear_2"),
)
IN_RESNET = (
    ("in_layers_2", "conv1"),
    ("out_layers_3", "conv2"),
    ("emb_layers_1", "time_emb_proj"),
    ("skip_connection", "conv_shortcut"),
)
IN_BLOCK = (
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out.0",
    "attn2.to_q",
    "attn2.to_k",
    "attn2.to_v",
    "attn2.to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
)
NORMS_IN_BLOCK = ("norm1", "norm2", "norm3")
NORMS_IN_RESNET = (("in_layers_0", "norm1"), ("out_layers_0", "norm2"))
IN_TEXT_LAYER = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
)
TEXT_LAYERS = {"text_encoder": 12, "text_encoder_2": 32}


def deep_parts() -> dict[str, Any]:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    real = sdxl_config(UNet2DConditionModel, "unet", {})
    sizes = {**MICRO_UNET, "block_out_channels": (8, 16, 24)}
    sizes["transformer_layers_per_block"] = real["transformer_layers_per_block"]
    texts = [
        CLIPTextConfig.from_pretrained(
            CONFIGS, subfolder=part, **{**micro, "num_hidden_layers": TEXT_LAYERS[part], "vocab_size": 50}
        )
        for part, micro in (("text_encoder", MICRO_TEXT), ("text_encoder_2", MICRO_TEXT_2))
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            "unet": UNet2DConditionModel.from_config(sdxl_config(UNet2DConditionModel, "unet", sizes)),
            "text_encoder": CLIPTextModel(texts[0]),
            "text_encoder_2": CLIPTextModelWithProjection(texts[1]),
        }


def sai_layers() -> dict[str, str]:
    """Kohya's name of every linear layer and convolution of SDXL's UNet, and diffusers' path: 794 of them."""
    return {**{sai: path for sai, path in transformer_layers().items()}, **resnet_layers(), **dict(OUTSIDE)}


def transformer_layers() -> dict[str, str]:
    """Those 722 that lie in transformers."""
    layers = {}
    for sai, path, depth in TRANSFORMERS:
        layers |= {f"{sai}_{end}": f"{path}.{end}" for end in ("proj_in", "proj_out")}
        for number in range(depth):
            for end in IN_BLOCK:
                inside = f"transformer_blocks.{number}.{end}"
                layers[f"{sai}_{inside.replace('.', '_')}"] = f"{path}.{inside}"
    return layers


def resnet_layers() -> dict[str, str]:
    """Those 66 that lie in resnets and between the stages. A shortcut stands where the width changes."""
    without = {"down_blocks.0.resnets.0", "down_blocks.0.resnets.1", "mid_block.resnets.0", "mid_block.resnets.1"}
    without |= {"down_blocks.1.resnets.1", "down_blocks.2.resnets.1"}
    layers = dict(SAMPLERS)
    for sai, path in RESNETS:
        layers |= {
            f"{sai}_{end}": f"{path}.{name}"
            for end, name in IN_RESNET
            if name != "conv_shortcut" or path not in without
        }
    return layers


def sai_norms() -> dict[str, str]:
    """Kohya's name of every norm of SDXL's UNet, and diffusers' path."""
    norms = {"out_0": "conv_norm_out"}
    for sai, path, depth in TRANSFORMERS:
        norms[f"{sai}_norm"] = f"{path}.norm"
        for number in range(depth):
            for end in NORMS_IN_BLOCK:
                norms[f"{sai}_transformer_blocks_{number}_{end}"] = f"{path}.transformer_blocks.{number}.{end}"
    for sai, path in RESNETS:
        norms |= {f"{sai}_{end}": f"{path}.{name}" for end, name in NORMS_IN_RESNET}
    return norms


def text_layers(part: str) -> list[str]:
    return [f"text_model.encoder.layers.{n}.{end}" for n in range(TEXT_LAYERS[part]) for end in IN_TEXT_LAYER]


def layer(part: nn.Module, path: str) -> Any:
    """A layer of a text encoder may lie within `text_model` or, from transformers 5.6 on, does not."""
    return part.get_submodule(path if hasattr(part, "text_model") else path.removeprefix("text_model."))


def random_factors(weight: Tensor, seed: int, rank: int = RANK) -> tuple[Tensor, Tensor]:
    """down [rank, in, ...] and up [out, rank, ...] of the size of the weight's own values."""
    draw = torch.Generator().manual_seed(seed)
    ones = [1] * (weight.dim() - 2)
    down = torch.randn(rank, *weight.shape[1:], generator=draw) * 0.1
    return down, torch.randn(weight.shape[0], rank, *ones, generator=draw) * 0.1


def changed(weight: Tensor, down: Tensor, up: Tensor, alpha: float) -> Tensor:
    """W + alpha / rank * B A, in float64."""
    product = up.double().flatten(1) @ down.double().flatten(1)
    return weight.detach().double() + alpha / down.shape[0] * product.reshape(weight.shape)


def worst_error(found: nn.Module, wanted: Mapping[str, Tensor]) -> float:
    """The largest difference of any tensor of a part, relative to the tensor's largest value."""
    state = {name.removeprefix("text_model."): value for name, value in found.state_dict().items()}
    errors = [
        float((state[name.removeprefix("text_model.")].double() - tensor.double()).abs().max() / tensor.abs().max())
        for name, tensor in wanted.items()
    ]
    return max(errors)
