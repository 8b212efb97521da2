from __future__ import annotations

from typing import Any

from ..sdxl_lora_core.lora.config import SaveBaseConfig
from ..sdxl_lora_core.lora.merged_base import save_merged_base
from ..sdxl_lora_core.sdxl.base import SDXLBase, open_base, prediction_arguments, require_single_file_size
from . import choices
from .host.folders import cache_folders, output_folder
from .host.progress import Progress
from .previews import show
from .widgets import link, widgets
from .wires import CATEGORY


class SaveMergedBase:
    """Writes a base with a stack of LoRAs merged into its weights as a new model."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Merges a LoRA stack into a base and saves the result to output/checkpoints, or to output/diffusers as a "
        "folder. The base is not changed, and nothing is overwritten."
    )
    SEARCH_ALIASES = ["save checkpoint", "merge lora into checkpoint", "bake lora", "fuse lora", "export model"]
    RETURN_TYPES = ("SDXL_BASE", "STRING", "STRING")
    RETURN_NAMES = ("base", "base_name", "report")
    OUTPUT_TOOLTIPS = (
        "The new model, for SDXL Generate (cached) without the stack.",
        "The new model's name in Load SDXL Base.",
        "What was merged, and how many modules of each LoRA fit.",
    )
    OUTPUT_NODE = True
    FUNCTION = "save"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "base": link("SDXL_BASE", "The model, from Load SDXL Base."),
                "lora_stack": link("LORA_STACK", "The LoRAs to merge, at their strengths."),
                **widgets(SaveBaseConfig, ("base_name", "layout", "precision")),
            },
        }

    def save(self, base: SDXLBase, lora_stack: Any, **settings: Any) -> dict[str, Any]:
        config = SaveBaseConfig(**settings)
        if config.layout == "single_file":
            require_single_file_size(base)
        stack = choices.open_loras(lora_stack)
        kind = "checkpoints" if config.layout == "single_file" else "diffusers"
        folder = output_folder() / kind
        with Progress() as progress:
            save = (base, stack, config, folder, choices.base_name_taken)
            path, fit = save_merged_base(*save, lambda done, total: progress(done, total, "merging parts"))
        merged = open_base(path, base.precision, cache_folders().hashes, **prediction_arguments(base))
        name = path.relative_to(folder.resolve()).as_posix()
        tokens = [f"new token {token} stays in its LoRA" for entry in stack for token in entry.tokens]
        report = "\n".join([f"saved as {name} in output/{kind}", *fit, *tokens])
        return show((merged, name, report), "\n".join([f"Saved as {path}.", *fit, *tokens]))
