"""The values on the wires of this pack, and conversions from and to ComfyUI's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

StackEntry = tuple[str, float, float]  # a subclass has .blocks, see strengths_by_block
CATEGORY = "SDXL LoRA"


class BlockStackEntry(tuple):
    """A LORA_STACK's entry with factors on its strength by block of the UNet: `mid_block=0, up_blocks.0=0.5`."""

    blocks: str

    def __new__(cls, entry: StackEntry, blocks: str) -> BlockStackEntry:
        made = super().__new__(cls, entry)
        made.blocks = blocks
        return made


def strengths_by_block(entry: Any) -> str:
    """The `.blocks` of an entry. Raises ValueError for another type, such as another pack's."""
    blocks = getattr(entry, "blocks", "") or ""
    if not isinstance(blocks, str):
        raise ValueError(f"lora_stack has blocks {blocks!r} for {entry[0]}: expected a text such as mid_block=0")
    return blocks


def to_image(pixels: Sequence[np.ndarray]) -> Tensor:
    """uint8 [H, W, 3] arrays of one size as ComfyUI's IMAGE: float32 [B, H, W, 3] in 0..1."""
    images = torch.empty(len(pixels), *pixels[0].shape)  # filled in place: a batch may take a gigabyte
    for image, values in zip(images, pixels, strict=True):
        torch.div(torch.tensor(values), 255, out=image)  # a copy: some arrays are read-only
    return images


def from_image(image: Tensor) -> list[np.ndarray]:
    """ComfyUI's IMAGE as uint8 [H, W, 3] arrays; transparency is composited on white, grey becomes RGB."""
    values = image.detach().float().nan_to_num().clamp(0, 1).cpu()
    if values.shape[-1] == 4:
        values, alpha = values[..., :3], values[..., 3:]
        values = values * alpha + 1 - alpha
    return list((values.expand(*values.shape[:3], 3) * 255).round().to(torch.uint8).numpy())


def to_latent(latents: Sequence[Tensor]) -> dict[str, Tensor]:
    """[4, H/8, W/8] tensors of one size as ComfyUI's LATENT, which is in the VAE's own scale."""
    return {"samples": torch.stack(list(latents))}


def from_latent(latent: Mapping[str, Any]) -> tuple[Tensor, list[np.ndarray]]:
    """The samples [B, 4, H/8, W/8] of ComfyUI's LATENT, and the masks that ComfyUI's nodes set on it."""
    noise_mask = latent.get("noise_mask")
    return latent["samples"].detach().clone(), [] if noise_mask is None else from_mask(noise_mask)


def from_mask(mask: Tensor) -> list[np.ndarray]:
    """ComfyUI's MASK [B, H, W], or one set on a LATENT [B, 1, H, W], as float32 arrays [H, W] in 0..1."""
    return list(mask.detach().float().nan_to_num().clamp(0, 1).reshape(-1, *mask.shape[-2:]).cpu().numpy())


def read_stack(stack: Any) -> list[StackEntry]:
    """A LORA_STACK of any pack as a new list of (name, strength on the UNet, strength on the text encoders).

    Accepts None, pairs, triples (a subclass is kept) and mappings. Raises ValueError for anything else.
    """
    entries = [_read_entry(entry) for entry in stack or []]
    return [entry for entry in entries if entry[0] not in ("", "None")]


def _read_entry(entry: Any) -> StackEntry:
    if isinstance(entry, tuple) and len(entry) == 3:
        return entry
    if isinstance(entry, Mapping):
        name = entry.get("name") or entry.get("lora_name") or entry.get("lora") or ""
        model = entry.get("strength_model", entry.get("strength", 1.0))
        return str(name), float(model), float(entry.get("strength_clip", model))
    if isinstance(entry, Sequence) and not isinstance(entry, str) and len(entry) in (2, 3):
        return str(entry[0]), float(entry[1]), float(entry[-1])
    raise ValueError(f"lora_stack contains {entry!r}: expected (name, strength_model, strength_clip)")
