"""ComfyUI's own MODEL and CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def with_lora(patcher: Any, kind: str, patches: Sequence[tuple[dict[str, Tensor], float]]) -> tuple[Any, list[str]]:
    """A clone of ComfyUI's MODEL or CLIP (`kind`) with a LoRA's patches, and the modules that it does not have.

    `patches` are tensors by kohya's keys with their strengths.
    """
    import comfy.lora

    if kind == "MODEL":
        keys = comfy.lora.model_lora_keys_unet(patcher.model, {})
    else:
        keys = comfy.lora.model_lora_keys_clip(patcher.cond_stage_model, {})
    patched = patcher.clone()
    missing: list[str] = []
    for tensors, strength in patches:
        missing += dict.fromkeys(name for key in tensors if (name := key.partition(".")[0]) not in keys)
        patched.add_patches(comfy.lora.load_lora(tensors, keys, log_missing=False), strength)
    return patched, missing
