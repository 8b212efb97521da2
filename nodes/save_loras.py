from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..sdxl_lora_core.lora.config import FILE_FORMATS, MERGE_METHODS, MergeLoRAsConfig, SaveLoRAConfig
from ..sdxl_lora_core.lora.describe import describe_lora
from ..sdxl_lora_core.lora.files import lora_of_state_dict, read_lora
from ..sdxl_lora_core.lora.modules import LoRAFile
from ..sdxl_lora_core.lora.saving import Source, merge_loras, save_lora, source_of_file, sources_of
from ..sdxl_lora_core.lora.writing import kohya_state_dict
from ..sdxl_lora_core.sdxl.precision import SAVE_PRECISIONS
from . import choices
from .host.folders import output_folder
from .host.progress import Progress
from .previews import show
from .widgets import widget
from .wires import CATEGORY

_STACK = "The LoRAs, from Load LoRA or Train SDXL LoRA. Their strengths become part of what is saved."
_FORMAT = "kohya: every program reads it. peft: diffusers' own names. comfyui: the names of ComfyUI's modules."
_PRECISION = "fp16 is usual. fp32 keeps every bit at twice the size."


class SaveSDXLLoRA:  # ComfyUI has a node SaveLoRA of its own
    """Writes a stack of LoRAs, or a LoRA on a wire, as one file."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Saves a LoRA stack, or the LoRA on a LORA_MODEL wire, to output/loras: in another format or precision, at a "
        "smaller rank, with its strengths built in. Several LoRAs become one that acts as all of them together."
    )
    SEARCH_ALIASES = ["save lora", "convert lora", "resize lora", "export lora", "lora to peft", "lora to kohya"]
    RETURN_TYPES = ("LORA_STACK", "STRING", "STRING")
    RETURN_NAMES = ("lora_stack", "lora_name", "report")
    OUTPUT_TOOLTIPS = (
        "The saved LoRA at strength 1.",
        "The file's name inside the loras folder.",
        "What was saved: keys, rank, alpha, trigger words.",
    )
    OUTPUT_NODE = True
    FUNCTION = "save"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "lora_name": widget(
                    SaveLoRAConfig, "lora_name", "STRING", "The file's name. Where it is taken, the next number is."
                ),
                "format": widget(SaveLoRAConfig, "format", FILE_FORMATS, _FORMAT),
                "precision": widget(SaveLoRAConfig, "precision", SAVE_PRECISIONS, _PRECISION),
            },
            "optional": {
                "lora_stack": ("LORA_STACK", {"tooltip": _STACK}),
                "lora": ("LORA_MODEL", {"tooltip": "Or a LoRA's weights, from Train SDXL LoRA or a core node."}),
                "rank": widget(
                    SaveLoRAConfig,
                    "rank",
                    "INT",
                    "The most that any module may have. 0 leaves ranks as they are.",
                    min=0,
                    max=4096,
                    advanced=True,
                ),
                "energy": widget(
                    SaveLoRAConfig,
                    "energy",
                    "FLOAT",
                    "The share of each change's energy to keep: 0.95 finds the smallest ranks that hold 95 %.",
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                ),
            },
        }

    def save(self, lora_stack: Any = None, lora: Any = None, **settings: Any) -> dict[str, Any]:
        config = SaveLoRAConfig(**settings)
        if (lora is None) == (lora_stack is None):
            raise ValueError("connect either lora_stack or lora, and not both")
        sources = sources_of(choices.open_loras(lora_stack)) if lora is None else [_of_wire(lora)]
        with Progress() as progress:
            path = save_lora(
                sources, config, _folder(), choices.lora_name_taken, lambda d, t: progress(d, t, "resizing")
            )
        return _saved(path, describe_lora(path))


class MergeLoRAs:
    """Makes one LoRA of a stack, by the method of choice, and saves it."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Merges a LoRA stack into one LoRA and saves it to output/loras. The strengths of the stack are the weights. "
        "concatenate is exact; svd, ties and dare give the rank that is asked for."
    )
    SEARCH_ALIASES = ["merge loras", "combine loras", "lora mixer", "ties", "dare", "svd merge"]
    RETURN_TYPES = ("LORA_STACK", "STRING", "LORA_MODEL", "STRING")
    RETURN_NAMES = ("lora_stack", "lora_name", "lora", "report")
    OUTPUT_TOOLTIPS = (
        "The merged LoRA at strength 1.",
        "The file's name inside the loras folder.",
        "The weights for the UNet, for ComfyUI's own Load LoRA Model and Save LoRA nodes.",
        "What was saved: keys, rank, alpha, trigger words.",
    )
    OUTPUT_NODE = True
    FUNCTION = "merge"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "lora_stack": ("LORA_STACK", {"tooltip": _STACK}),
                "lora_name": widget(
                    MergeLoRAsConfig, "lora_name", "STRING", "The file's name. Where it is taken, the next number is."
                ),
                "method": widget(
                    MergeLoRAsConfig,
                    "method",
                    MERGE_METHODS,
                    "concatenate: exact, the ranks add up. linear: adds up the factors of equal ranks, as peft does. "
                    "svd: the best LoRA of the rank. ties, dare: thin changes out first, so that they clash less.",
                ),
                "rank": widget(
                    MergeLoRAsConfig, "rank", "INT", "The rank of the result of svd, ties and dare.", min=1, max=4096
                ),
            },
            "optional": {
                "density": widget(
                    MergeLoRAsConfig,
                    "density",
                    "FLOAT",
                    "The share of each change's numbers that ties and dare keep.",
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                ),
                "seed": widget(
                    MergeLoRAsConfig,
                    "seed",
                    "INT",
                    "Decides which numbers dare keeps.",
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=False,
                    advanced=True,
                ),
                "format": widget(MergeLoRAsConfig, "format", FILE_FORMATS, _FORMAT, advanced=True),
                "precision": widget(MergeLoRAsConfig, "precision", SAVE_PRECISIONS, _PRECISION, advanced=True),
            },
        }

    def merge(self, lora_stack: Any, **settings: Any) -> dict[str, Any]:
        config = MergeLoRAsConfig(**settings)
        with Progress() as progress:
            path = merge_loras(
                sources_of(choices.open_loras(lora_stack)),
                config,
                _folder(),
                choices.lora_name_taken,
                lambda done, total: progress(done, total, "merging"),
            )
        weights = kohya_state_dict(LoRAFile(unet=read_lora(path).unet), torch.float32)
        return _saved(path, describe_lora(path), (weights,))


def _folder() -> Path:
    return output_folder() / "loras"


def _of_wire(lora: Any) -> Source:
    with torch.inference_mode(False):
        return source_of_file("lora", lora_of_state_dict("lora", {key: value.clone() for key, value in lora.items()}))


def _saved(path: Path, report: str, more: tuple[Any, ...] = ()) -> dict[str, Any]:
    name = path.relative_to(_folder().resolve()).as_posix()
    return show(([(name, 1.0, 1.0)], name, *more, report), f"saved as {name}\n{report}")
