"""The values on the wires of this pack, and conversions from and to ComfyUI's."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..sdxl_lora_core.images.lazy import Lazy
from ..sdxl_lora_core.lora.stack import LoRARef
from ..sdxl_lora_core.messages import shown

StackEntry = tuple[str, float, float]  # a subclass has .blocks, see strengths_by_block
CATEGORY = "SDXL LoRA"
# The keys of rows that are mappings, in the spellings of several packs; those of the page have no effect.
_NAME_KEYS = ("name", "lora_name", "lora")
_MODEL_KEYS = ("strength_model", "model_strength", "modelStrength", "strength", "weight")
_CLIP_KEYS = ("strength_clip", "clip_strength", "clipStrength", "strengthTwo")
_SWITCHES = ("on", "active", "enabled")
_PAGE_KEYS = ("id", "expanded", "collapsed", "locked", "selected")


class BlockStackEntry(tuple):
    """A LORA_STACK's entry with factors on its strength by block of the UNet: `mid_block=0, up_blocks.0=0.5`."""

    blocks: str

    def __new__(cls, entry: StackEntry, blocks: str) -> BlockStackEntry:
        made = super().__new__(cls, entry)
        made.blocks = blocks
        return made


def stack_entry(lora: LoRARef) -> Any:
    """A LoRA as an entry of a LORA_STACK."""
    made = (lora.name, lora.strength_model, lora.strength_clip)
    return BlockStackEntry(made, lora.blocks) if lora.blocks.strip() else made


def strengths_by_block(entry: Any) -> str:
    """The `.blocks` of an entry. Raises ValueError for another type, such as another pack's."""
    blocks = getattr(entry, "blocks", "") or ""
    if not isinstance(blocks, str):
        raise ValueError(f"lora_stack has blocks {shown(blocks)} for {entry[0]}: expected a text such as mid_block=0")
    return blocks


def to_image(pixels: Sequence[np.ndarray]) -> Tensor:
    """uint8 [H, W, 3] arrays of one size as ComfyUI's IMAGE: float32 [B, H, W, 3] in 0..1."""
    images = torch.empty(len(pixels), *pixels[0].shape)  # filled in place: a batch may take a gigabyte
    for image, values in zip(images, pixels, strict=True):
        torch.div(torch.tensor(values), 255, out=image)  # a copy: some arrays are read-only
    return images


def from_image(image: Tensor) -> Sequence[np.ndarray]:
    """ComfyUI's IMAGE as uint8 [H, W, 3] arrays; transparency is composited on white, grey becomes RGB.

    Each is converted when it is looked at.
    """
    return Lazy(len(image), functools.partial(_pixels, image.detach()))


def _pixels(image: Tensor, number: int) -> np.ndarray:
    values = image[number].float().nan_to_num().clamp(0, 1).cpu()
    if values.shape[-1] == 4:
        values, alpha = values[..., :3], values[..., 3:]
        values = values * alpha + 1 - alpha
    return (values.expand(*values.shape[:2], 3) * 255).round().to(torch.uint8).numpy()


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

    Accepts None, pairs, triples (a subclass is kept) and mappings; rows that are switched off are left out. Raises
    ValueError for anything else, for unknown keys of a mapping and for strengths that are not finite numbers.
    """
    entries = [_read_entry(entry) for entry in stack or [] if _is_on(entry)]
    return [entry for entry in entries if entry[0] not in ("", "None")]


def _is_on(entry: Any) -> bool:
    return not isinstance(entry, Mapping) or all(bool(entry.get(key, True)) for key in _SWITCHES)


def _read_entry(entry: Any) -> StackEntry:
    if isinstance(entry, tuple) and len(entry) == 3:
        _ = _strength(entry, entry[1]), _strength(entry, entry[2])
        return entry
    if isinstance(entry, Mapping):
        return _read_mapping(entry)
    if isinstance(entry, Sequence) and not isinstance(entry, str) and len(entry) in (2, 3):
        return str(entry[0]), _strength(entry, entry[1]), _strength(entry, entry[-1])
    raise ValueError(f"lora_stack contains {shown(entry)}: expected (name, strength_model, strength_clip)")


def _read_mapping(row: Mapping[str, Any]) -> StackEntry:
    known = {*_NAME_KEYS, *_MODEL_KEYS, *_CLIP_KEYS, *_SWITCHES, *_PAGE_KEYS}
    if unknown := [key for key in row if key not in known]:
        raise ValueError(
            f"lora_stack has a row with {shown(unknown[0])}, which is unknown: use {_NAME_KEYS[0]}, {_MODEL_KEYS[0]} "
            f"and {_CLIP_KEYS[0]}"
        )
    name = next((row[key] for key in _NAME_KEYS if row.get(key)), "")
    model = next((row[key] for key in _MODEL_KEYS if row.get(key) is not None), 1.0)
    clip = next((row[key] for key in _CLIP_KEYS if row.get(key) is not None), model)
    return str(name), _strength(row, model), _strength(row, clip)


def _strength(entry: Any, value: Any) -> float:
    try:
        strength = float(value)
    except (TypeError, ValueError, OverflowError):
        strength = math.nan
    if not math.isfinite(strength):
        raise ValueError(f"lora_stack has the strength {shown(value)} in {shown(entry)}: use a number such as 1.0")
    return strength
