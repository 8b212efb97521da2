from __future__ import annotations

from typing import Any

import numpy as np

from ..sdxl_lora_core.dataset.caption_dataset import CaptionDataset, load_caption_dataset, quick_fingerprint
from ..sdxl_lora_core.dataset.config import DatasetConfig
from ..sdxl_lora_core.dataset.report import contact_sheet, describe
from . import choices
from .host.folders import cache_folder
from .previews import show
from .widgets import widget
from .wires import CATEGORY, to_image


class LoadCaptionDataset:
    """Reads a folder of captioned images."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Reads a folder of images with captions for training. Captions may stand in .txt or .caption files beside the "
        "images, in a captions folder, in metadata.csv or in metadata.jsonl."
    )
    SEARCH_ALIASES = ["caption dataset", "training images", "load dataset", "lora dataset", "image text folder"]
    RETURN_TYPES = ("CAPTION_DATASET", "IMAGE", "STRING", "INT")
    RETURN_NAMES = ("dataset", "preview", "report", "count")
    OUTPUT_TOOLTIPS = (
        "The captioned images, for Train SDXL LoRA.",
        "One contact sheet of the images with their captions.",
        "What was found, what was left out and why.",
        "The number of training images.",
    )
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "folder": (
                    choices.names("dataset"),
                    {"tooltip": "A folder inside ComfyUI's input folder, or of models type 'datasets'."},
                ),
                "trigger_word": widget(
                    DatasetConfig,
                    "trigger_word",
                    "STRING",
                    "A word put in front of every caption. Use it in prompts to call what the LoRA learned. "
                    "Empty: captions stay as they are.",
                ),
                "resolution": widget(
                    DatasetConfig,
                    "resolution",
                    "INT",
                    "Images are scaled and cropped to buckets of about resolution x resolution pixels. "
                    "1024 for SDXL, 128 for the bundled tiny-sdxl.",
                    min=64,
                    max=4096,
                    step=16,
                ),
                "validation_percent": widget(
                    DatasetConfig,
                    "validation_percent",
                    "INT",
                    "Share of the images kept out of training to measure the loss on. 0: train on all.",
                    min=0,
                    max=50,
                ),
            },
            "optional": {
                "dataset": ("CAPTION_DATASET", {"tooltip": "A dataset to train on together with this one."}),
                "repeats": widget(
                    DatasetConfig,
                    "repeats",
                    "INT",
                    "How often each image of this folder is seen while other folders are seen once.",
                    min=1,
                    max=1000,
                    advanced=True,
                ),
                "flip": widget(
                    DatasetConfig,
                    "flip",
                    "BOOLEAN",
                    "Mirror images at random. Not for text, faces or anything that has a left and a right.",
                    advanced=True,
                ),
                "random_crops": widget(
                    DatasetConfig,
                    "random_crops",
                    "INT",
                    "Cut images at this many random places instead of the middle. 0: the middle. For images that do "
                    "not fill their bucket exactly; each place is encoded once.",
                    min=0,
                    max=64,
                    advanced=True,
                ),
                "caption_per_line": widget(
                    DatasetConfig,
                    "caption_per_line",
                    "BOOLEAN",
                    "Each line of a caption file is a caption of its own, and each step draws one of them. "
                    "Off: the lines are one caption.",
                    advanced=True,
                ),
                "is_regularisation": widget(
                    DatasetConfig,
                    "is_regularisation",
                    "BOOLEAN",
                    "These images show the class of what is learned (any cat, where yours is learned), and the LoRA is "
                    "to leave them as they are. Connect the training images' dataset, and leave trigger_word empty.",
                    advanced=True,
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, folder: str | None = None) -> bool | str:
        return choices.check("dataset", folder)

    @classmethod
    def IS_CHANGED(cls, folder: str | None = None, **settings: Any) -> str:
        return choices.content("dataset", folder, quick_fingerprint)

    def load(self, folder: str, dataset: CaptionDataset | None = None, **settings: Any) -> dict[str, Any]:
        path = choices.find("dataset", folder)
        loaded = load_caption_dataset(
            path, DatasetConfig(**settings), chained=dataset, hash_memo=cache_folder() / "hashes"
        )
        sheet = np.asarray(contact_sheet(loaded))
        report = describe(loaded)
        return show((loaded, to_image([sheet]), report, len(loaded.entries)), report, [sheet])
