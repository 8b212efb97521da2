"""Converts diffusers' tensor names to those of single-file SDXL checkpoints.

The other direction is done by diffusers itself; see loading.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .family import Part
from .file_kinds import TEXT, TEXT_2, UNET, VAE
from .unet_names import sai_block_name

_VAE_STAGES = 4
_VAE_NAMES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda found: f"up.{_VAE_STAGES - 1 - int(found[1])}.block.{found[2]}"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{_VAE_STAGES - 1 - int(found[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_(q|k|v)", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
)
_OPENCLIP_NAMES = (
    ("encoder.layers.", "transformer.resblocks."),
    ("final_layer_norm", "ln_final"),
    ("layer_norm", "ln_"),
    ("self_attn", "attn"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("embeddings.token_embedding", "token_embedding"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
)
_TEMPERATURE = 4.6055  # OpenCLIP's logit scale: SDXL does not use it, but loaders expect it


def published_names(part: Part, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A part's state dict with the names and layouts of a single-file checkpoint."""
    by_part: dict[Part, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = {
        "unet": _unet,
        "vae": _vae,
        "text_encoder": _clip,
        "text_encoder_2": _openclip,
    }
    return by_part[part](tensors)


def _unet(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    published = {}
    for name, value in tensors.items():
        path, _, leaf = name.rpartition(".")
        sai = sai_block_name(path)
        stage, upsampler, _ = path.partition(".upsamplers.")
        if upsampler and f"{stage}.attentions.0.norm.weight" not in tensors:  # as in SD 1.5's first up block
            sai = sai.replace(".2.conv", ".1.conv")  # it follows the resnet
        published[f"{UNET}{sai}.{leaf}"] = value
    return published


def _vae(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    published = {}
    for name, value in tensors.items():
        for pattern, replacement in _VAE_NAMES:
            name = re.sub(pattern, replacement, name)
        if "attn_1" in name and value.dim() == 2:
            value = value[:, :, None, None]  # published as 1x1 convolutions
        published[VAE + name] = value
    return published


def _clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{TEXT}text_model.{name.removeprefix('text_model.')}": value for name, value in tensors.items()}


def openclip_place(name: str) -> tuple[str, int | None]:
    """OpenCLIP's name of a tensor and, for q, k and v, which are stored in one matrix, the third that it is."""
    name = name.removeprefix("text_model.")
    for ours, theirs in _OPENCLIP_NAMES:
        name = name.replace(ours, theirs)
    found = re.search(r"\.([qkv])_proj\.", name)
    if found is None:
        return TEXT_2 + name, None
    return TEXT_2 + name.replace(f"{found[1]}_proj.", "in_proj_"), "qkv".index(found[1])


def _openclip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Joins q, k and v, and transposes the projection, as published checkpoints have them."""
    published: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for name, value in tensors.items():
        place, third = openclip_place(name)
        if third is None:
            published[place] = value
        else:
            thirds.setdefault(place, {})[third] = value
    published |= {place: torch.cat([rows[third] for third in range(3)]) for place, rows in thirds.items()}
    projection = published.pop(f"{TEXT_2}text_projection.weight")
    published[f"{TEXT_2}text_projection"] = projection.T
    published[f"{TEXT_2}logit_scale"] = torch.tensor(_TEMPERATURE, dtype=projection.dtype)
    return published
