"""Opens and loads ControlNets for SDXL (Zhang et al., arXiv 2302.05543), and checks that they fit the base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import json_sha256
from ..runtime.library_logs import quiet_libraries
from ..safetensors_file import WeightsHeader, read_header
from ..sdxl.base import SDXLBase, require_sdxl, weights_sha256
from ..sdxl.detection import read_json
from ..sdxl.file_kinds import CONTROL, SDXL_CONTROL_NETS, kind_of, require_unscaled
from ..sdxl.loading import align, assembled, read_tensors, require_complete, weight_files
from ..sdxl.unet_names import diffusers_block_name

WANTED = (
    "use an SDXL ControlNet or ControlNet-Union: a .safetensors file, or a diffusers folder with config.json and "
    ".safetensors"
)
_HINT = "controlnet_cond_embedding"
_PUBLISHED_HINT = {"input_hint_block.0": f"{_HINT}.conv_in", "input_hint_block.14": f"{_HINT}.conv_out"}
_PUBLISHED = (
    (re.compile(r"zero_convs\.(\d+)\.0"), lambda found: f"controlnet_down_blocks.{found[1]}"),
    (re.compile(r"middle_block_out\.0"), lambda found: "controlnet_mid_block"),
    (re.compile(r"input_hint_block\.(\d+)"), lambda found: f"{_HINT}.blocks.{int(found[1]) // 2 - 1}"),
)
_IMAGE_CHANNELS = 3
_SHARED_WITH_BASE = {
    "block_out_channels": "blocks of width",
    "layers_per_block": "layers per block",
    "cross_attention_dim": "text of width",
    "projection_class_embeddings_input_dim": "added input of width",
}

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ControlNet:
    """A ControlNet without its weights. `sha256` covers the content: the file, or a folder's settings and weights.

    `settings` are arguments of diffusers' ControlNetModel, as far as the tensors and a folder's config.json determine
    them. `control_types` is the number of control types of a ControlNet-Union, 0 for other ControlNets.
    """

    path: Path
    name: str
    sha256: str
    settings: Mapping[str, Any] = field(compare=False)
    control_types: int

    @property
    def files(self) -> list[Path]:
        return weight_files(self.path)


def open_control_net(path: Path, hash_memo: Path | None = None) -> ControlNet:
    """Checks and hashes a ControlNet. `hash_memo` is a folder that stores hashes (see file_sha256).

    Raises FileNotFoundError if `path` does not exist, ValueError if it is not an SDXL ControlNet, naming what it is.
    """
    if not path.exists():
        raise FileNotFoundError(f"ControlNet {path.name} does not exist: {WANTED}")
    stated = read_json(path / "config.json") if path.is_dir() else {}
    headers = [read_header(file) for file in weight_files(path)]
    whole = WeightsHeader(path, {name: shape for one in headers for name, shape in one.shapes.items()}, {})
    settings = {**stated, **require_control_net(whole)}
    digest = weights_sha256(path, "control_net", hash_memo)
    name = path.name if path.is_dir() else path.stem
    return ControlNet(path, name, digest, settings, settings.get("num_control_type", 0))


def require_control_net(header: WeightsHeader) -> dict[str, Any]:
    """The settings that the tensors determine. Raises ValueError unless they are those of an SDXL ControlNet."""
    kind = kind_of(header)
    if kind not in SDXL_CONTROL_NETS:
        raise ValueError(f"{header.path.name} is {kind}: {WANTED}")
    require_unscaled(header)
    try:
        settings = _layout({diffusers_name(name): shape for name, shape in header.shapes.items()})
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"{header.path.name} looks like {kind}, but lacks the tensor {error}: download it again"
        ) from error
    if settings["conditioning_channels"] != _IMAGE_CHANNELS:
        raise ValueError(
            f"{header.path.name} takes images with {settings['conditioning_channels']} channels instead of red, green "
            f"and blue: {WANTED}"
        )
    return settings


def require_fit(net: ControlNet, base: SDXLBase) -> None:
    """Raises ValueError unless the base has the widths and layers of the ControlNet."""
    require_sdxl(base, f"ControlNet {net.name}")
    unet = read_json(base.configs / "unet" / "config.json")
    for setting, what in _SHARED_WITH_BASE.items():
        found, wanted = net.settings.get(setting), unet[setting]
        if found is not None and list(_several(found)) != list(_several(wanted)):
            raise ValueError(
                f"ControlNet {net.name} has {what} {found}, the base {base.name} {wanted}: it was made for another "
                "kind of model, use a ControlNet made for SDXL"
            )


def settings_with(net: ControlNet, base: SDXLBase) -> dict[str, Any]:
    """All settings of the net. What its tensors do not determine, such as the number of attention heads, is as in the
    base's UNet, whose down blocks a ControlNet copies."""
    return {**read_json(base.configs / "unet" / "config.json"), **net.settings}


def describe_control_net(net: ControlNet) -> str:
    size = sum(file.stat().st_size for file in net.files)
    kind = f"ControlNet-Union of {net.control_types} types" if net.control_types else "ControlNet"
    return f"{net.name}: SDXL, {kind}, {size / 1e9:.2f} GB of weights"


def diffusers_name(name: str) -> str:
    """The tensor's name in diffusers' ControlNetModel, from that name or from the published one.

    diffusers' own conversion is for ControlNets of Stable Diffusion 1 and 2: it leaves out SDXL's label_emb.
    """
    path, _, leaf = name.removeprefix(CONTROL).rpartition(".")
    if path in _PUBLISHED_HINT:
        return f"{_PUBLISHED_HINT[path]}.{leaf}"
    for pattern, renamed in _PUBLISHED:
        if found := pattern.fullmatch(path):
            return f"{renamed(found)}.{leaf}"
    path = diffusers_block_name(path) or path
    return f"{path}.{leaf}" if path else leaf


def _layout(shapes: Shapes) -> dict[str, Any]:
    stages = range(_count(shapes, r"down_blocks\.(\d+)\."))
    attentive = [any(name.startswith(f"down_blocks.{stage}.attentions.") for name in shapes) for stage in stages]
    hints = range(1, _count(shapes, rf"{_HINT}\.blocks\.(\d+)\."), 2)
    text_widths = {shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")}
    in_middle = any(name.startswith("mid_block.attentions.") for name in shapes)
    return {
        "in_channels": shapes["conv_in.weight"][1],
        "block_out_channels": [shapes[f"down_blocks.{stage}.resnets.0.conv1.weight"][0] for stage in stages],
        "down_block_types": ["CrossAttnDownBlock2D" if found else "DownBlock2D" for found in attentive],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if in_middle else "UNetMidBlock2D",
        "layers_per_block": _count(shapes, r"down_blocks\.0\.resnets\.(\d+)\."),
        "transformer_layers_per_block": [_depth(shapes, f"down_blocks.{stage}") for stage in stages],
        "projection_class_embeddings_input_dim": shapes["add_embedding.linear_1.weight"][1],
        "conditioning_channels": shapes[f"{_HINT}.conv_in.weight"][1],
        "conditioning_embedding_out_channels": [
            shapes[f"{_HINT}.conv_in.weight"][0],
            *(shapes[f"{_HINT}.blocks.{hint}.weight"][0] for hint in hints),
        ],
        **({"cross_attention_dim": text_widths.pop()} if len(text_widths) == 1 else {}),
        **(_union_layout(shapes) if "task_embedding" in shapes else {}),
    }


def _union_layout(shapes: Shapes) -> dict[str, Any]:
    types, width = shapes["task_embedding"]
    return {
        "num_control_type": types,
        "num_trans_channel": width,
        "num_trans_layer": _count(shapes, r"transformer_layes\.(\d+)\."),
        "num_proj_channel": shapes["spatial_ch_projs.weight"][0],
    }


def _depth(shapes: Shapes, block: str) -> int:
    return _count(shapes, rf"{re.escape(block)}\.attentions\.0\.transformer_blocks\.(\d+)\.")


def _count(shapes: Shapes, pattern: str) -> int:
    """One more than the largest number that the pattern matches at the start of a name."""
    numbers = (int(found[1]) for name in shapes if (found := re.match(pattern, name)))
    return 1 + max(numbers, default=-1)


def _several(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def load_control_net(net: ControlNet, base: SDXLBase, dtype: torch.dtype) -> nn.Module:
    """The module on the CPU, in eval mode, without gradients. Raises ValueError if its tensors do not fit."""
    import diffusers

    tensors: dict[str, Tensor] = {}
    for file in net.files:
        tensors |= {diffusers_name(name): tensor for name, tensor in read_tensors(file, "", dtype).items()}
    model_class = diffusers.ControlNetUnionModel if net.control_types else diffusers.ControlNetModel
    with quiet_libraries():
        module, wrong = assembled(model_class, settings_with(net, base), tensors)
    require_complete(wrong, "ControlNet", net.path.name)
    return align(module).eval().requires_grad_(False)


def load_key(net: ControlNet, base: SDXLBase, dtype: torch.dtype) -> str:
    """A key that changes whenever load_control_net would return different weights."""
    return json_sha256([net.sha256, settings_with(net, base), str(dtype)])
