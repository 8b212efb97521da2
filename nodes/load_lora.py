from __future__ import annotations

from typing import Any

from ..sdxl_lora_core.lora.describe import describe_lora
from ..sdxl_lora_core.lora.stack import read_blocks_of
from . import choices
from .previews import show
from .wires import CATEGORY, BlockStackEntry, read_stack, strengths_by_block

INCOMING = "(incoming)"


class LoadLoRA:
    """Adds a LoRA to a stack, or weighs the one that comes in."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Adds a LoRA to a stack. With (incoming) the strengths apply to the last LoRA of the stack that comes in, "
        "so that one trained in this graph can be weighted."
    )
    SEARCH_ALIASES = ["lora loader", "lora stack", "apply lora", "lora strength"]
    RETURN_TYPES = ("LORA_STACK", "STRING")
    RETURN_NAMES = ("lora_stack", "info")
    OUTPUT_TOOLTIPS = (
        "The incoming LoRAs and this one, for SDXL Generate (cached) or another pack's LoRA stack input.",
        "Keys, rank, trigger words and what the LoRA was trained on.",
    )
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        strength = {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05}
        return {
            "required": {
                "lora_name": (
                    [INCOMING, *choices.names("lora")],
                    {"tooltip": f"A file in the loras folder. {INCOMING}: the last LoRA of the incoming stack."},
                ),
                "strength_model": ("FLOAT", {**strength, "tooltip": "Strength on the UNet. 0 turns it off."}),
                "strength_clip": (
                    "FLOAT",
                    {**strength, "tooltip": "Strength on the text encoders, for LoRAs that change them."},
                ),
                "enabled": ("BOOLEAN", {"default": True, "tooltip": "Off: the LoRA is left out of the stack."}),
            },
            "optional": {
                "lora_stack": ("LORA_STACK", {"tooltip": "LoRAs to apply before this one."}),
                "blocks": (
                    "STRING",
                    {
                        "default": "",
                        "advanced": True,
                        "tooltip": "Factors on strength_model by block of the UNet: mid_block=0, up_blocks.0=0.5. "
                        "Blocks that are not named keep the strength.",
                    },
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, lora_name: str | None = None) -> bool | str:
        return lora_name == INCOMING or choices.check("lora", lora_name)

    @classmethod
    def IS_CHANGED(cls, lora_name: str | None = None, **settings: Any) -> str:
        return "" if lora_name == INCOMING else choices.content("lora", lora_name, choices.stamp)

    def load(
        self,
        lora_name: str,
        strength_model: float,
        strength_clip: float,
        enabled: bool,
        lora_stack: Any = None,
        blocks: str = "",
    ) -> dict[str, Any]:
        stack = read_stack(lora_stack)
        if lora_name == INCOMING:
            if not stack:
                raise ValueError(f"lora_name is {INCOMING} but lora_stack brings no LoRA: connect one or choose a file")
            incoming = stack.pop()
            lora_name, blocks = incoming[0], blocks or strengths_by_block(incoming)
        read_blocks_of(lora_name, blocks)
        entry: Any = (lora_name, strength_model, strength_clip)
        if blocks.strip():
            entry = BlockStackEntry(entry, blocks)
        info = describe_lora(choices.find("lora", lora_name)) if enabled else f"{lora_name} is off"
        return show(([*stack, entry] if enabled else stack, info), info)
