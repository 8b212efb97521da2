"""The outputs of ControlNets, which the UNet adds to its skip connections and its middle block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..images.crop import fit_image
from ..sdxl.latents import VAE_SCALE
from ..sdxl.noise_levels import is_within
from .config import ControlConfig
from .control import type_index

Residuals = tuple[Sequence[Tensor], Tensor]  # for the skip connections of the down blocks, and for the middle block


@dataclass
class ActiveControl:
    """A loaded ControlNet during one denoising.

    `net` is a ControlNetModel or ControlNetUnionModel; `hints`, uint8 [H, W, 3], has one for each image of the batch.
    """

    net: Any
    hints: Sequence[np.ndarray]
    config: ControlConfig
    _fitted: Tensor | None = field(default=None, init=False)

    def is_active(self, progress: float) -> bool:
        return is_within(progress, self.config.start_percent, self.config.end_percent)

    def hints_for(self, sample: Tensor) -> Tensor:
        """The hints, [rows, 3, H, W] from 0 to 1, scaled and cropped to the images that `sample` will become."""
        if self._fitted is None:
            height, width = (VAE_SCALE * side for side in sample.shape[-2:])
            pixels = np.stack([fit_image(hint, width, height) for hint in self.hints])
            self._fitted = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255).to(sample.device, sample.dtype)
        return self._fitted.repeat(len(sample) // len(self._fitted), 1, 1, 1)  # for both halves of guidance

    def residuals(self, sample: Tensor, timestep: Tensor, inputs: Mapping[str, Any]) -> Residuals:
        hints: Any = self.hints_for(sample)
        arguments: dict[str, Any] = {}
        if types := self.net.config.get("num_control_type"):
            index = type_index(self.config)
            chosen = torch.zeros(len(sample), types).to(sample)
            chosen[:, index] = 1
            hints, arguments = [hints], {"control_type": chosen, "control_type_idx": [index]}
        return self.net(
            sample, timestep, controlnet_cond=hints, conditioning_scale=self.config.strength, **arguments, **inputs
        )


def control_residuals(
    controls: Sequence[ActiveControl], progress: float, sample: Tensor, timestep: Tensor, inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """The UNet's arguments with the summed residuals of the controls that are active at `progress`; empty for none.

    `sample` and `inputs` are those of the UNet: with guidance the ControlNets see both halves of the batch as well.
    """
    active = [control.residuals(sample, timestep, inputs) for control in controls if control.is_active(progress)]
    if not active:
        return {}
    downs, mids = zip(*active, strict=True)
    return {
        "down_block_additional_residuals": [sum(residuals[1:], residuals[0]) for residuals in zip(*downs, strict=True)],
        "mid_block_additional_residual": sum(mids[1:], mids[0]),
    }
