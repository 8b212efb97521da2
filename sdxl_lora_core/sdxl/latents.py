"""Encodes images with the VAE, and converts between the scales of latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ..images.crop import Crop, crop_to_bucket

VAE_SCALE = 8  # pixels per latent
LATENT_CHANNELS = 4


def crop_pixels(image: Image.Image, crop: Crop, mirrored: bool) -> Tensor:
    """Crops an RGB image: float32 [3, H, W] in -1..1."""
    return torch.from_numpy(_cropped(image, crop, mirrored)).permute(2, 0, 1).contiguous() / 127.5 - 1


def crop_mask(image: Image.Image, crop: Crop, mirrored: bool) -> Tensor:
    """Crops a mask (mode L) and averages it to the size of the latents: float32 [1, H/8, W/8] in 0..1, 1 for white."""
    return avg_pool2d(torch.from_numpy(_cropped(image, crop, mirrored))[None] / 255, kernel_size=8)


def _cropped(image: Image.Image, crop: Crop, mirrored: bool) -> np.ndarray:
    part = crop_to_bucket(image, crop)
    if mirrored:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(part, dtype=np.float32)


def encode_posterior(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's posterior, each float32 [B, 4, H/8, W/8], in the UNet's scale.

    The scale is (z - latents_mean) * scaling_factor / latents_std; SDXL's own VAE has 0.13025 and no mean or std.
    """
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    mean, std = posterior.mean.float(), posterior.std.float()
    shift, scale = _shift_and_scale(mean, vae.config)
    return ((mean - shift) * scale).cpu(), (std * scale).cpu()


def scaled(latents: Tensor, vae_config: Any) -> Tensor:
    """From the VAE's own scale, which ComfyUI's LATENT has, to that of the UNet."""
    shift, scale = _shift_and_scale(latents, vae_config)
    return (latents - shift) * scale


def unscaled(latents: Tensor, vae_config: Any) -> Tensor:
    """The inverse of `scaled`."""
    shift, scale = _shift_and_scale(latents, vae_config)
    return latents / scale + shift


def _shift_and_scale(like: Tensor, vae_config: Any) -> tuple[Tensor | float, Tensor | float]:
    """Some VAEs have a mean and standard deviation per channel, which broadcast over [..., 4, H, W]."""
    if vae_config.get("latents_mean") is None:
        return 0.0, vae_config.scaling_factor
    mean, std = (like.new_tensor(vae_config[name]).view(-1, 1, 1) for name in ("latents_mean", "latents_std"))
    return mean, vae_config.scaling_factor / std
