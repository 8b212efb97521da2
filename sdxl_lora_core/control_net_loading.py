"""The weights of a ControlNet as diffusers' ControlNetModel or ControlNetUnionModel, offline."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .control_nets import ControlNet, diffusers_name, settings_with
from .files import json_sha256
from .runtime.library_logs import quiet_libraries
from .sdxl.base import SDXLBase
from .sdxl.loading import align, assembled, read_tensors, require_complete


def load_control_net(net: ControlNet, base: SDXLBase, dtype: torch.dtype) -> nn.Module:
    """On the CPU, in eval mode, without gradients. Raises ValueError if tensors are missing, unknown or misshapen."""
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
    """Another key means that load_control_net gives another module."""
    return json_sha256([net.sha256, settings_with(net, base), str(dtype)])
