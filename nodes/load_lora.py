from __future__ import annotations

from typing import Any

from ..sdxl_lora_core.lora.describe import read_card
from ..sdxl_lora_core.lora.stack import read_blocks_of
from . import choices
from .previews import show
from .widgets import link
from .wires import CATEGORY, BlockStackEntry, read_stack, strengths_by_block

INCOMING = "(incoming)"
_BLOCKS_HELP = (
    "Factors on strength_model by block of the UNet: mid_block=0, up_blocks.0=0.5. Other blocks keep the strength."
)


class LoadLoRA:
    """Adds a LoRA to a stack, or sets the strengths of the connected one."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Adds a LoRA to a stack. With (incoming) the strengths apply to the last LoRA of the connected stack, for one "
        "that is trained in the same graph."
    )
    SEARCH_ALIASES = ["lora loader", "lora stack", "apply lora", "lora strength", "trigger words"]
    RETURN_TYPES = ("LORA_STACK", "STRING", "STRING")
    RETURN_NAMES = ("lora_stack", "info", "trigger_words")
    OUTPUT_TOOLTIPS = (
        "The connected LoRAs and this one, for SDXL Generate (cached) or another pack's LoRA stack input.",
        "The LoRA's keys, rank, trigger words and training base.",
        "The words that the LoRA was trained on, separated by commas, for a prompt. Empty if the file names none.",
    )
    HAS_INTERMEDIATE_OUTPUT = True  # ComfyUI 0.33 then sends what the node shows, too, if it was cached
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        file_help = f"A file in the loras folder. {INCOMING}: the last LoRA of the connected stack."
        strength = {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05}
        model_help = "Strength on the UNet. 0 turns it off."
        clip_help = "Strength on the text encoders, for LoRAs that change them."
        return {
            "required": {
                "lora_name": ([INCOMING, *choices.names("lora")], {"tooltip": file_help}),
                "strength_model": ("FLOAT", {**strength, "tooltip": model_help}),
                "strength_clip": ("FLOAT", {**strength, "tooltip": clip_help}),
                "enabled": ("BOOLEAN", {"default": True, "tooltip": "Off: the LoRA is left out of the stack."}),
            },
            "optional": {
                "lora_stack": link("LORA_STACK", "LoRAs to apply before this one."),
                "blocks": ("STRING", {"default": "", "advanced": True, "tooltip": _BLOCKS_HELP}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, lora_name: str | None = None) -> bool | str:
        return lora_name == INCOMING or choices.check("lora", lora_name)

    @classmethod
    def IS_CHANGED(cls, lora_name: str | None = None, **settings: Any) -> str:
        return "" if lora_name == INCOMING else choices.content("lora", lora_name)

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
        name, blocks = _chosen(lora_name, stack, blocks)
        if not enabled:
            return show((stack, info := f"{name} is off", ""), info)
        card = read_card(choices.find("lora", name))
        loaded = [*stack, _entry((name, strength_model, strength_clip), blocks)]
        return show((loaded, str(card), ", ".join(card.trigger_words)), str(card), lora=[card.as_json()])


def _chosen(lora_name: str, stack: list[Any], blocks: str) -> tuple[str, str]:
    """The name and the block factors of the LoRA; (incoming) takes the last one off the stack.

    Raises ValueError for an empty stack and for unknown blocks.
    """
    if lora_name == INCOMING:
        if not stack:
            raise ValueError(f"lora_name is {INCOMING} but lora_stack has no LoRA: connect one or choose a file")
        incoming = stack.pop()
        lora_name, blocks = incoming[0], blocks or strengths_by_block(incoming)
    read_blocks_of(lora_name, blocks)
    return lora_name, blocks


def _entry(entry: tuple[str, float, float], blocks: str) -> Any:
    return BlockStackEntry(entry, blocks) if blocks.strip() else entry
