"""ComfyUI's own MODEL and CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def with_lora(patcher: Any, kind: str, changes: Sequence[tuple[dict[str, Tensor], float]]) -> tuple[Any, list[str]]:
    """ComfyUI's MODEL or CLIP (`kind`) with what a LoRA changes at a strength, and the modules that it does not have.

    `changes` have kohya's keys. What came in stays as it is.
    """
    import comfy.lora

    if kind == "MODEL":
        keys = comfy.lora.model_lora_keys_unet(patcher.model, {})
    else:
        keys = comfy.lora.model_lora_keys_clip(patcher.cond_stage_model, {})
    changed = patcher.clone()
    missing: list[str] = []
    for tensors, strength in changes:
        missing += dict.fromkeys(name for key in tensors if (name := key.partition(".")[0]) not in keys)
        changed.add_patches(comfy.lora.load_lora(tensors, keys, log_missing=False), strength)
    return changed, missing
