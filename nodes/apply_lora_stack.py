from __future__ import annotations

from typing import Any

from ..sdxl_lora_core.lora.patches import core_changes, describe_fit
from ..sdxl_lora_core.sdxl.loading import ENCODERS, Part
from . import choices
from .host.comfy import nothing
from .host.core_models import with_lora
from .previews import show
from .wires import CATEGORY


class ApplyLoRAStack:
    """Puts a stack of LoRAs on core's MODEL and CLIP."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Applies a LoRA stack to core's MODEL and CLIP, for those who sample with KSampler. Every spelling that Load "
        "LoRA reads is applied, PEFT's and diffusers' too, which core's loader leaves out in part; what of a LoRA does "
        "not fit is said."
    )
    SEARCH_ALIASES = ["lora stack", "apply lora stack", "lora loader", "ksampler lora", "model clip lora"]
    RETURN_TYPES = ("MODEL", "CLIP", "STRING")
    RETURN_NAMES = ("model", "clip", "info")
    OUTPUT_TOOLTIPS = (
        "The model with the stack, for KSampler.",
        "The CLIP with the stack, for CLIP Text Encode. Without a CLIP that comes in, what hangs on it does not run.",
        "For each LoRA how many of its modules the model and the CLIP have.",
    )
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "An SDXL model, from core's Load Checkpoint."}),
                "lora_stack": ("LORA_STACK", {"tooltip": "From Load LoRA, Train SDXL LoRA or another pack."}),
            },
            "optional": {
                "clip": ("CLIP", {"tooltip": "Its CLIP, for LoRAs that change the text encoders."}),
            },
        }

    def apply(self, model: Any, lora_stack: Any, clip: Any = None) -> dict[str, Any]:
        lines = []
        targets: dict[str, tuple[Part, ...]] = {"MODEL": ("unet",)}
        if clip is not None:
            targets["CLIP"] = ENCODERS
        patched = {"MODEL": model, "CLIP": clip}
        for entry in choices.open_loras(lora_stack):
            found, missing = {}, {}
            for target, parts in targets.items():
                changes = core_changes(entry, parts)
                found[target] = sum(len(entry.modules(part)) for part in parts)
                patched[target], missing[target] = with_lora(patched[target], target, changes)
            lines.append(describe_fit(entry, found, missing))
        info = "\n".join(lines) or "the stack is empty"
        return show((patched["MODEL"], nothing() if clip is None else patched["CLIP"], info), info)
