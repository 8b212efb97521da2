"""Random ControlNets for tests, whose zero convolutions are not zero, in each form in which they are published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from sdxl_lora_core.control.config import ControlConfig
from sdxl_lora_core.control.control import Control
from sdxl_lora_core.control.control_net import open_control_net
from sdxl_lora_core.sdxl.base import SDXLBase, load_part
from sdxl_lora_core.sdxl.unet_names import sai_block_name

SIDE = 64
UNION_TYPES = 8


def random_net(base: SDXLBase, seed: int, union: bool = False) -> Any:
    """A copy of the base's way down with random ways in and out, strong enough to move pixels."""
    from diffusers import ControlNetModel

    unet = load_part(base, "unet", torch.float32)
    net = _random_union(unet) if union else ControlNetModel.from_unet(unet)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if name.startswith(("controlnet_", "task_", "transformer_layes", "spatial_", "control_add")):
                scale = 1 / weight[0].numel() ** 0.5 if weight.dim() > 1 else 0.1
                weight.copy_(torch.randn(weight.shape, generator=draw) * scale * 1.5)
    return net.eval()


def _random_union(unet: Any) -> Any:
    """ControlNetUnionModel.from_unet knows no widths but those of the full size."""
    from diffusers import ControlNetModel, ControlNetUnionModel

    plain = ControlNetModel.from_unet(unet)
    width = unet.config.block_out_channels[0]
    sizes = {"num_control_type": UNION_TYPES, "num_trans_channel": width, "num_proj_channel": width}
    net = ControlNetUnionModel.from_config({**plain.config, **sizes})
    net.load_state_dict(plain.state_dict(), strict=False)
    return net


def published_names(tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """As the first ControlNets were saved, written out by hand."""
    renamed = {"controlnet_mid_block": "middle_block_out.0", "controlnet_cond_embedding.conv_in": "input_hint_block.0"}
    renamed |= {"controlnet_cond_embedding.conv_out": "input_hint_block.14"}
    renamed |= {f"controlnet_cond_embedding.blocks.{n}": f"input_hint_block.{2 + 2 * n}" for n in range(6)}
    renamed |= {f"controlnet_down_blocks.{n}": f"zero_convs.{n}.0" for n in range(9)}
    published = {}
    for name, value in tensors.items():
        path, _, leaf = name.rpartition(".")
        published[f"{prefix}{renamed.get(path) or sai_block_name(path)}.{leaf}"] = value
    return published


def save_single(path: Path, net: nn.Module) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, path)
    return path


def hint(seed: int = 0, width: int = SIDE, height: int = SIDE) -> np.ndarray:
    """White shapes on black, as an edge detector gives."""
    small = np.random.default_rng(seed).integers(0, 2, (8, 8, 1), np.uint8) * 255
    return np.asarray(Image.fromarray(small.repeat(3, 2)).resize((width, height), Image.Resampling.NEAREST))


def control(path: Path, *hints: np.ndarray, **settings: Any) -> Control:
    return Control(open_control_net(path), hints or (hint(),), ControlConfig(**settings))
