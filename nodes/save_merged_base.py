from __future__ import annotations

from typing import Any

from ..sdxl_lora_core.lora.config import BASE_LAYOUTS, SaveBaseConfig
from ..sdxl_lora_core.lora.merged_base import save_merged_base
from ..sdxl_lora_core.sdxl.base import SDXLBase, open_base, said_to_predict
from ..sdxl_lora_core.sdxl.precision import SAVE_PRECISIONS
from . import choices
from .host.folders import cache_folder, output_folder
from .host.progress import Progress
from .previews import show
from .widgets import widget
from .wires import CATEGORY


class SaveMergedBase:
    """Writes a base with a stack of LoRAs in its weights as a new model."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Merges a LoRA stack into a base and saves the result to output/checkpoints, or to output/diffusers as a "
        "folder. The base stays as it is, and nothing is overwritten."
    )
    SEARCH_ALIASES = ["save checkpoint", "merge lora into checkpoint", "bake lora", "fuse lora", "export model"]
    RETURN_TYPES = ("SDXL_BASE", "STRING", "STRING")
    RETURN_NAMES = ("base", "base_name", "report")
    OUTPUT_TOOLTIPS = (
        "The new model, for SDXL Generate (cached) without the stack.",
        "The new model's name in Load SDXL Base.",
        "What was merged, and how much of each LoRA fitted.",
    )
    OUTPUT_NODE = True
    FUNCTION = "save"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "base": ("SDXL_BASE", {"tooltip": "The model, from Load SDXL Base."}),
                "lora_stack": ("LORA_STACK", {"tooltip": "The LoRAs to merge, at their strengths."}),
                "base_name": widget(
                    SaveBaseConfig, "base_name", "STRING", "The new model's name. A number follows where it is taken."
                ),
                "layout": widget(
                    SaveBaseConfig,
                    "layout",
                    BASE_LAYOUTS,
                    "single_file: a checkpoint for every program. diffusers: a folder, written with less memory.",
                ),
                "precision": widget(
                    SaveBaseConfig,
                    "precision",
                    SAVE_PRECISIONS,
                    "fp16 is usual: 7 GB. bf16 has a wider range and fewer digits. fp32: 14 GB.",
                ),
            },
        }

    def save(self, base: SDXLBase, lora_stack: Any, **settings: Any) -> dict[str, Any]:
        config = SaveBaseConfig(**settings)
        stack = choices.open_loras(lora_stack)
        kind = "checkpoints" if config.layout == "single_file" else "diffusers"
        with Progress() as progress:
            path, fit = save_merged_base(
                base,
                stack,
                config,
                output_folder() / kind,
                choices.base_name_taken,
                lambda done, total: progress(done, total, "merging parts"),
            )
        merged = open_base(path, base.precision, cache_folder() / "hashes", **said_to_predict(base))
        tokens = [f"new token {name} stays in its LoRA" for entry in stack for name in entry.tokens]
        name = path.relative_to((output_folder() / kind).resolve()).as_posix()
        report = "\n".join([f"saved as {name} in output/{kind}", *fit, *tokens])
        return show((merged, name, report), report)
