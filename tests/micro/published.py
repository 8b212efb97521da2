"""The micro model's tensors under the names of single-file SDXL checkpoints."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from sdxl_lora_core.sdxl.unet_names import sai_block_name


def bare(name: str) -> str:
    return name.removeprefix("text_model.")


def published_unet(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    pairs = ((name.rpartition("."), value) for name, value in tensors.items())
    return {f"model.diffusion_model.{sai_block_name(path)}.{leaf}": value for (path, _, leaf), value in pairs}


_VAE_NAMES = (
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda found: f"up.{3 - int(found[1])}.block.{found[2]}"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{3 - int(found[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
    (r"group_norm", "norm"),
    (r"attn_1\.to_(q|k|v)", r"attn_1.\1"),
    (r"attn_1\.to_out\.0", "attn_1.proj_out"),
)


def published_vae(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    published = {}
    for name, value in tensors.items():
        for pattern, replacement in _VAE_NAMES:
            name = re.sub(pattern, replacement, name)
        if "attn_1" in name and value.dim() == 2:
            value = value[:, :, None, None].contiguous()  # published as 1x1 convolutions
        published[f"first_stage_model.{name}"] = value
    return published


_OPENCLIP_NAMES = (
    ("encoder.layers.", "transformer.resblocks."),
    ("layer_norm", "ln_"),
    ("self_attn", "attn"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("final_ln_", "ln_final"),
    ("embeddings.token_embedding", "token_embedding"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
)


def published_openclip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP keeps query, key and value in one matrix, and the projection transposed."""
    published = {}
    for name, value in tensors.items():
        name = bare(name)
        for ours, theirs in _OPENCLIP_NAMES:
            name = name.replace(ours, theirs)
        published[f"conditioner.embedders.1.model.{name}"] = value
    for name in [name for name in published if ".q_proj." in name]:
        leaf = name.rpartition(".")[2]
        rows = [published.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        published[name.replace(f"q_proj.{leaf}", f"in_proj_{leaf}")] = torch.cat(rows)
    projection = published.pop("conditioner.embedders.1.model.text_projection.weight")
    published["conditioner.embedders.1.model.text_projection"] = projection.T.contiguous()
    return published
