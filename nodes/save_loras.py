from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..sdxl_lora_core.lora.config import MergeLoRAsConfig, SaveLoRAConfig
from ..sdxl_lora_core.lora.describe import describe_lora
from ..sdxl_lora_core.lora.files import lora_of_state_dict, read_lora
from ..sdxl_lora_core.lora.modules import LoRAFile
from ..sdxl_lora_core.lora.saving import merge_loras, save_lora
from ..sdxl_lora_core.lora.stack import StackEntry, entry_in_memory
from ..sdxl_lora_core.lora.writing import kohya_state_dict
from . import choices
from .host.folders import output_folder
from .host.progress import Progress
from .previews import show
from .widgets import link, widgets
from .wires import CATEGORY

_STACK_HELP = "The LoRAs, from Load LoRA or Train SDXL LoRA. Their strengths become part of what is saved."
_REPORT_HELP = "A description of the saved file: keys, rank, alpha, trigger words."
_NAME_HELP = "The file's name inside the loras folder."


class SaveSDXLLoRA:  # ComfyUI has a node SaveLoRA of its own
    """Writes a stack of LoRAs, or a LoRA on a wire, as one file."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Saves a LoRA stack, or the LoRA on a LORA_MODEL wire, to output/loras: in another format or precision, at a "
        "lower rank, with its strengths built in. Several LoRAs become one that acts as all of them together."
    )
    SEARCH_ALIASES = ["save lora", "convert lora", "resize lora", "export lora", "lora to peft", "lora to kohya"]
    RETURN_TYPES = ("LORA_STACK", "STRING", "STRING")
    RETURN_NAMES = ("lora_stack", "lora_name", "report")
    OUTPUT_TOOLTIPS = ("The saved LoRA at strength 1.", _NAME_HELP, _REPORT_HELP)
    OUTPUT_NODE = True
    FUNCTION = "save"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": widgets(SaveLoRAConfig, ("lora_name", "format", "precision")),
            "optional": {
                "lora_stack": link("LORA_STACK", _STACK_HELP),
                "lora": link("LORA_MODEL", "Or a LoRA's weights, from Train SDXL LoRA or a node of ComfyUI."),
                **widgets(SaveLoRAConfig, ("rank", "energy"), advanced=True),
            },
        }

    def save(self, lora_stack: Any = None, lora: Any = None, **settings: Any) -> dict[str, Any]:
        config = SaveLoRAConfig(**settings)
        if (lora is None) == (lora_stack is None):
            raise ValueError("connect either lora_stack or lora, and not both")
        stack = choices.open_loras(lora_stack) if lora is None else [_of_wire(lora)]
        return _saved(_written(save_lora, stack, config, "resizing"))


class MergeLoRAs:
    """Merges a stack into one LoRA by the chosen method, and saves it."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Merges a LoRA stack into one LoRA and saves it to output/loras. The strengths of the stack are the weights. "
        "concatenate is exact; svd, ties and dare give a chosen rank."
    )
    SEARCH_ALIASES = ["merge loras", "combine loras", "lora mixer", "ties", "dare", "svd merge"]
    RETURN_TYPES = ("LORA_STACK", "STRING", "LORA_MODEL", "STRING")
    RETURN_NAMES = ("lora_stack", "lora_name", "lora", "report")
    OUTPUT_TOOLTIPS = (
        "The merged LoRA at strength 1.",
        _NAME_HELP,
        "The weights for the UNet, for ComfyUI's own Load LoRA Model and Save LoRA nodes.",
        _REPORT_HELP,
    )
    OUTPUT_NODE = True
    FUNCTION = "merge"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "lora_stack": link("LORA_STACK", _STACK_HELP),
                **widgets(MergeLoRAsConfig, ("lora_name", "method", "rank")),
            },
            "optional": widgets(MergeLoRAsConfig, ("density", "seed", "format", "precision"), advanced=True),
        }

    def merge(self, lora_stack: Any, **settings: Any) -> dict[str, Any]:
        config = MergeLoRAsConfig(**settings)
        path = _written(merge_loras, choices.open_loras(lora_stack), config, "merging")
        return _saved(path, (kohya_state_dict(LoRAFile(unet=read_lora(path).unet), torch.float32),))


def _folder() -> Path:
    return output_folder() / "loras"


def _written(write: Callable[..., Path], stack: Sequence[StackEntry], config: Any, phase: str) -> Path:
    with Progress() as progress:
        return write(stack, config, _folder(), choices.lora_name_taken, lambda d, t: progress(d, t, phase))


def _of_wire(lora: Any) -> StackEntry:
    with torch.inference_mode(False):
        return entry_in_memory("lora", lora_of_state_dict("lora", {key: value.clone() for key, value in lora.items()}))


def _saved(path: Path, more: tuple[Any, ...] = ()) -> dict[str, Any]:
    name, report = path.relative_to(_folder().resolve()).as_posix(), describe_lora(path)
    return show(([(name, 1.0, 1.0)], name, *more, report), f"Saved as {path}.\n{report}")
