"""Image to image and inpainting: images or latents to start from, with masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ..files import array_sha256
from ..images.crop import fit_image
from ..sdxl.latents import LATENT_CHANNELS, VAE_SCALE, encode_posterior, scaled
from .config import GenerateConfig
from .schedulers import DenoisingSchedule

Generators = Sequence[torch.Generator]  # one for each image


@dataclass(frozen=True, eq=False)
class StartImage:
    """The image or latents that one image starts from, at that image's size.

    `content` is either pixels, uint8 [H, W, 3], or latents, float32 [4, H/8, W/8] in the VAE's own scale. `mask`, bool
    [H, W], is True where the content may change; None for everywhere.
    """

    content: np.ndarray | Tensor
    mask: np.ndarray | None = None

    @cached_property
    def key(self) -> dict[str, Any]:
        """The part of the image's cache key: SHA-256 hashes of content and mask."""
        kind = "image" if isinstance(self.content, np.ndarray) else "latents"
        key = {kind: array_sha256(np.asarray(self.content))}
        return key if self.mask is None else {**key, "mask": array_sha256(self.mask)}


@dataclass(frozen=True)
class EncodedStart:
    """The VAE's posterior of a start: mean and, for pixels, standard deviation [1, 4, h, w], on the CPU.

    They are in the UNet's scale. `mask` is float32 [1, 1, h, w], 1 where the image may change.
    """

    mean: Tensor
    std: Tensor | None
    mask: Tensor | None

    def sample(self, generator: torch.Generator) -> Tensor:
        """Latents sampled from the posterior, as diffusers' pipelines do."""
        if self.std is None:
            return self.mean
        return self.mean + self.std * torch.randn(self.mean.shape, generator=generator)


@dataclass(frozen=True)
class Inpainting:
    """The part of the start that denoising must keep. All tensors are on the device.

    `start` and `noise` are float32 [B, 4, h, w]; `mask` is float32 [B, 1, h, w], 1 where the image may change.
    """

    start: Tensor
    noise: Tensor
    mask: Tensor

    def restored(self, latents: Tensor, scheduler: Any, next_timestep: Tensor) -> Tensor:
        """The latents with the kept area replaced by the start, noised for `next_timestep`; [1], empty at the end.

        diffusers' StableDiffusionXLInpaintPipeline does the same with a UNet that was not trained for inpainting.
        """
        kept = scheduler.add_noise(self.start, self.noise, next_timestep) if len(next_timestep) else self.start
        return ((1 - self.mask) * kept + self.mask * latents).to(latents.dtype)


def start_images(
    config: GenerateConfig,
    images: Sequence[np.ndarray] = (),
    latents: Tensor | None = None,
    masks: Sequence[np.ndarray] = (),
) -> list[StartImage]:
    """Starts from images (uint8 [H, W, 3]) or latents ([B, 4, h, w], the VAE's own scale), with masks (0 to 1, [H, W]).

    Images are scaled to cover width x height and cropped to the center, and so are their masks, which must have the
    image's size; masks of latents are resized. One image is used with several masks, and one mask with several images.
    Zeros at denoise 1, the output of ComfyUI's Empty Latent Image, count as no start: the image and its key are then
    those of text to image. Raises ValueError for sizes and counts that do not match.
    """
    if masks and not any(mask.any() for mask in masks):  # ComfyUI's Load Image gives one where there is no alpha
        raise ValueError("mask is empty, so nothing would be repainted: paint one, or disconnect it")
    if images and latents is not None:
        raise ValueError("image and latent are both given: disconnect one of them")
    if latents is not None:
        _require_latents(latents, config)
        contents: list[Any] = list(latents.detach().float().cpu())
        fitted = [_resized_mask(mask, config) for mask in masks]
        if config.denoise == 1 and not masks and not latents.any() and _is_count(len(contents), config):
            return []
    else:
        contents = [fit_image(image, config.width, config.height) for image in images]
        fitted = _masks_of_images(images, masks, config)
    if not contents:
        if masks:
            raise ValueError("mask is given without an image or latent: connect one or disconnect mask")
        return []
    if not all(mask.any() for mask in fitted):
        raise ValueError("mask is empty, so nothing would be repainted: paint one, or disconnect it")
    count = max(len(contents), len(fitted))
    return [
        StartImage(content, mask)
        for content, mask in zip(
            _for_each(contents, count, "image"), _for_each(fitted or [None], count, "mask"), strict=True
        )
    ]


def enlarged(pixels: np.ndarray, first: StartImage | None, config: GenerateConfig) -> StartImage:
    """The start of a second pass: the enlarged image (Lanczos) of the first one, with the mask of its start."""
    mask = None if first is None or first.mask is None else _resized_mask(first.mask.astype(np.float32), config)
    return StartImage(fit_image(pixels, config.width, config.height), mask)


def encode_start(start: StartImage, vae: Any) -> EncodedStart:
    mask = None if start.mask is None else _on_latent_grid(start.mask)
    if isinstance(start.content, Tensor):
        return EncodedStart(scaled(start.content[None], vae.config), None, mask)
    pixels = torch.from_numpy(np.array(start.content)).permute(2, 0, 1)[None] / 127.5 - 1
    mean, std = encode_posterior(vae, pixels)
    return EncodedStart(mean, std, mask)


def require_counts(starts: Sequence[StartImage], config: GenerateConfig) -> None:
    """Raises ValueError unless there is one start for all images or one for each, and denoise has its start."""
    if starts and not _is_count(len(starts), config):
        wanted = len(config.prompts) * config.count
        raise ValueError(
            f"{len(starts)} images or masks are given to start from, but {wanted} images are requested "
            f"(prompts x count): give 1 for all of them, or {wanted}"
        )
    if config.denoise < 1 and not starts:
        raise ValueError(
            f"denoise is {config.denoise:g}, but there is no start: connect an image or a latent, or set denoise to 1"
        )


def _is_count(starts: int, config: GenerateConfig) -> bool:
    return starts in (1, len(config.prompts) * config.count)


def noise_latents(schedule: DenoisingSchedule, config: GenerateConfig, generators: Generators, unet: Any) -> Tensor:
    """Noise at the first level of the schedule, [B, 4, h, w] in the UNet's precision and on its device."""
    return _noise(config, generators).to(unet.device, unet.dtype) * schedule.scheduler.init_noise_sigma


def noised_starts(
    schedule: DenoisingSchedule,
    config: GenerateConfig,
    starts: Sequence[EncodedStart],
    generators: Generators,
    unet: Any,
) -> tuple[Tensor, Inpainting | None]:
    """The starts at the first level of the schedule, as noise_latents, and the part of them that inpainting keeps.

    Noise is added in float32; diffusers' pipelines do it in the UNet's precision.
    """
    sampled = [start.sample(generator) for start, generator in zip(starts, generators, strict=True)]
    start = torch.cat(sampled).to(unet.device)
    noise = _noise(config, generators).to(unet.device)
    latents = schedule.scheduler.add_noise(start, noise, schedule.timesteps[:1].repeat(len(start)))
    masks = [encoded.mask for encoded in starts if encoded.mask is not None]
    if masks and config.denoise == 1:  # as in diffusers' inpainting: the repainted area starts from noise alone
        latents = noise * schedule.scheduler.init_noise_sigma
    inpainting = Inpainting(start, noise, torch.cat(masks).to(unet.device)) if masks else None
    return latents.to(unet.dtype), inpainting


def _noise(config: GenerateConfig, generators: Generators) -> Tensor:
    """Noise, float32 [B, 4, H/8, W/8], sampled on the CPU: the same on every device and at every precision."""
    size = (1, LATENT_CHANNELS, config.height // VAE_SCALE, config.width // VAE_SCALE)
    return torch.cat([torch.randn(size, generator=generator) for generator in generators])


def _masks_of_images(
    images: Sequence[np.ndarray], masks: Sequence[np.ndarray], config: GenerateConfig
) -> list[np.ndarray]:
    for mask in masks:
        if images and mask.shape[:2] != images[0].shape[:2]:
            found, wanted = (f"{array.shape[1]}x{array.shape[0]}" for array in (mask, images[0]))
            raise ValueError(f"mask is {found} and image is {wanted}: use a mask of the image's size")
    grey = [(mask * 255).round().astype(np.uint8) for mask in masks]
    return [fit_image(mask, config.width, config.height) >= 128 for mask in grey]


def _resized_mask(mask: np.ndarray, config: GenerateConfig) -> np.ndarray:
    grey = Image.fromarray((mask * 255).round().astype(np.uint8))
    return np.asarray(grey.resize((config.width, config.height), Image.Resampling.LANCZOS)) >= 128


def _require_latents(latents: Tensor, config: GenerateConfig) -> None:
    wanted = (LATENT_CHANNELS, config.height // VAE_SCALE, config.width // VAE_SCALE)
    if latents.dim() != 4 or latents.shape[1] != LATENT_CHANNELS:
        raise ValueError(f"latent has shape {list(latents.shape)}, SDXL's have [images, 4, height/8, width/8]")
    if latents.shape[1:] != wanted:
        height, width = (VAE_SCALE * side for side in latents.shape[2:])
        raise ValueError(
            f"latent is of an image of {width}x{height}, but width and height are {config.width}x{config.height}: "
            "set them to the same"
        )


def _for_each(given: Sequence[Any], count: int, name: str) -> list[Any]:
    if len(given) not in (1, count):
        raise ValueError(f"{len(given)} {name}s are given for {count} starts: give 1 or {count}")
    return list(given) * (count // len(given))


def _on_latent_grid(mask: np.ndarray) -> Tensor:
    height, width = mask.shape
    pixels = torch.from_numpy(mask.astype(np.float32))[None, None]
    return interpolate(pixels, size=(height // VAE_SCALE, width // VAE_SCALE))
