from __future__ import annotations

from typing import Any

import numpy as np

from ..sdxl_lora_core.dataset.caption_dataset import CaptionDataset, load_caption_dataset
from ..sdxl_lora_core.dataset.config import DatasetConfig
from ..sdxl_lora_core.dataset.report import checked, contact_sheet, describe
from . import choices
from .host.folders import cache_folders
from .previews import show
from .widgets import link, widgets
from .wires import CATEGORY, to_image

_FACE = ("trigger_word", "resolution", "validation_percent")
_ADVANCED = ("repeats", "flip", "random_crops", "caption_per_line", "is_regularisation")


class LoadCaptionDataset:
    """Reads a folder of captioned images."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Reads a folder of images with captions for training. Captions can be in .txt or .caption files beside the "
        "images, in a captions folder, in metadata.csv or in metadata.jsonl."
    )
    SEARCH_ALIASES = [
        "caption dataset",
        "training images",
        "load dataset",
        "lora dataset",
        "image text folder",
        "captions",
        "kohya",
    ]
    RETURN_TYPES = ("CAPTION_DATASET", "IMAGE", "STRING", "INT")
    RETURN_NAMES = ("dataset", "preview", "report", "count")
    OUTPUT_TOOLTIPS = (
        "The captioned images, for Train SDXL LoRA.",
        "A contact sheet of the images with their captions.",
        "What was found, what was skipped and why.",
        "The number of training images.",
    )
    HAS_INTERMEDIATE_OUTPUT = True  # ComfyUI 0.33 then sends what the node shows, too, if it was cached
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "folder": choices.combo(
                    "dataset", "A folder inside ComfyUI's input folder, or of model type 'datasets'."
                ),
                **widgets(DatasetConfig, _FACE),
            },
            "optional": {
                "dataset": link("CAPTION_DATASET", "A dataset to train on together with this one."),
                **widgets(DatasetConfig, _ADVANCED, advanced=True),
                "captioned_folder": link(
                    "STRING", "The folder from Caption Images, which then runs first. It replaces folder.", force=True
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, folder: str | None = None) -> bool | str:
        return choices.check("dataset", folder)

    @classmethod
    def IS_CHANGED(cls, folder: str | None = None, **settings: Any) -> str:
        return choices.content("dataset", folder)

    def load(
        self, folder: str, dataset: CaptionDataset | None = None, captioned_folder: str = "", **settings: Any
    ) -> dict[str, Any]:
        folder = captioned_folder or folder
        path = choices.find("dataset", folder)
        loaded = load_caption_dataset(path, DatasetConfig(**settings), dataset, cache_folders().hashes)
        sheet, report = np.asarray(contact_sheet(loaded)), describe(loaded)
        outputs = (loaded, to_image([sheet]), report, len(loaded.entries))
        return show(outputs, report, [sheet], dataset=[{"folder": folder, **checked(loaded)}])
