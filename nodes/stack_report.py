from __future__ import annotations

import json
from typing import Any

from ..sdxl_lora_core.lora.analysis import analyse_stack
from ..sdxl_lora_core.lora.analysis_chart import stack_chart
from . import choices
from .previews import show
from .widgets import link
from .wires import CATEGORY, to_image


class StackReport:
    """Says which LoRAs of a stack work against each other, before anything is generated."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Compares the LoRAs of a stack by their files alone: where each changes the model, which two work against each "
        "other or do the same, and how strong they are together."
    )
    SEARCH_ALIASES = ["lora conflict", "compare loras", "analyze lora", "lora overlap", "lora blocks", "lora strength"]
    RETURN_TYPES = ("LORA_STACK", "IMAGE", "STRING")
    RETURN_NAMES = ("lora_stack", "chart", "report")
    OUTPUT_TOOLTIPS = (
        "The connected stack, unchanged.",
        "Shares of change by block, and the cosines of the pairs.",
        "Norms, energies and effective ranks by block, overlaps and cosines of the pairs, as JSON.",
    )
    OUTPUT_NODE = True
    FUNCTION = "report"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"lora_stack": link("LORA_STACK", "The LoRAs, from Load LoRA or Train SDXL LoRA.")}}

    def report(self, lora_stack: Any) -> dict[str, Any]:
        analysis = analyse_stack(choices.open_loras(lora_stack))
        chart = stack_chart(analysis)
        report = json.dumps(analysis.as_json(), ensure_ascii=False, indent=1, allow_nan=False)
        return show((lora_stack, to_image([chart]), report), "\n".join(analysis.sentences()), [chart])
