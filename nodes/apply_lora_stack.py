from __future__ import annotations

from typing import Any

from ..sdxl_lora_core.lora.patches import comfyui_patches, describe_fit
from ..sdxl_lora_core.lora.stack import StackEntry
from ..sdxl_lora_core.sdxl.family import ENCODERS, Part
from . import choices
from .host.comfy import nothing
from .host.comfyui_models import with_lora
from .previews import show
from .widgets import link
from .wires import CATEGORY

_PARTS: dict[str, tuple[Part, ...]] = {"MODEL": ("unet",), "CLIP": ENCODERS}


class ApplyLoRAStack:
    """Applies a stack of LoRAs to ComfyUI's MODEL and CLIP."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Applies a LoRA stack to ComfyUI's MODEL and CLIP, for sampling with KSampler. Every key format that Load LoRA "
        "reads is applied, including PEFT's and diffusers', which ComfyUI's loader reads only in part. Modules that do "
        "not fit are listed in info."
    )
    SEARCH_ALIASES = ["lora stack", "apply lora stack", "lora loader", "ksampler lora", "model clip lora"]
    RETURN_TYPES = ("MODEL", "CLIP", "STRING")
    RETURN_NAMES = ("model", "clip", "info")
    OUTPUT_TOOLTIPS = (
        "The model with the stack, for KSampler.",
        "The CLIP with the stack, for CLIP Text Encode. Without a connected CLIP, nodes on this output do not run.",
        "For each LoRA, how many of its modules the model and the CLIP have.",
    )
    HAS_INTERMEDIATE_OUTPUT = True  # ComfyUI 0.33 then sends what the node shows, too, if it was cached
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": link("MODEL", "An SDXL model, from ComfyUI's Load Checkpoint."),
                "lora_stack": link("LORA_STACK", "From Load LoRA, Train SDXL LoRA or another pack."),
            },
            "optional": {"clip": link("CLIP", "Its CLIP, for LoRAs that change the text encoders.")},
        }

    def apply(self, model: Any, lora_stack: Any, clip: Any = None) -> dict[str, Any]:
        patched, lines = {"MODEL": model, **({} if clip is None else {"CLIP": clip})}, []
        for entry in choices.open_loras(lora_stack):
            patched, line = _applied(patched, entry)
            lines.append(line)
        info = "\n".join(lines) or "the stack is empty"
        return show((patched["MODEL"], patched.get("CLIP", nothing()), info), info)


def _applied(models: dict[str, Any], entry: StackEntry) -> tuple[dict[str, Any], str]:
    """The models with a LoRA, and a line that says how many of its modules they have."""
    patched, found, missing = {}, {}, {}
    for kind, model in models.items():
        found[kind] = sum(len(entry.modules(part)) for part in _PARTS[kind])
        patched[kind], missing[kind] = with_lora(model, kind, comfyui_patches(entry, _PARTS[kind]))
    return patched, describe_fit(entry, found, missing)
