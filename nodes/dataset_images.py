from __future__ import annotations

from typing import Any

import numpy as np

from ..sdxl_lora_core.dataset.caption_dataset import CaptionDataset
from ..sdxl_lora_core.images.crop import fit_image
from ..sdxl_lora_core.images.decode import open_image
from .previews import show
from .widgets import link
from .wires import CATEGORY, to_image

SHOWN = 16  # images on the node
_SIZE_HELP = "The side of the square images in pixels: each is scaled to cover it and cropped to its centre."
_COUNT_HELP = "How many images, from the start of the folder. 0: all; each of 1024 x 1024 pixels takes 13 MB of memory."


class DatasetImages:
    """Gives the images of a dataset as a batch, with their captions."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "The images of a dataset as one batch, with their captions: to score a folder of images, to start image to "
        "image from them, or as images for a ControlNet."
    )
    SEARCH_ALIASES = ["load images from folder", "image folder", "batch load images", "dataset to images", "captions"]
    RETURN_TYPES = ("IMAGE", "STRING", "INT")
    RETURN_NAMES = ("images", "captions", "count")
    OUTPUT_TOOLTIPS = (
        "The images, those to train on first, then those held out and those for regularisation.",
        "One line for each image: its first caption, with the trigger word.",
        "The number of images.",
    )
    HAS_INTERMEDIATE_OUTPUT = True  # ComfyUI 0.33 then sends what the node shows, too, if it was cached
    FUNCTION = "images"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "dataset": link("CAPTION_DATASET", "The folder, from Load Caption Dataset."),
                "size": ("INT", {"default": 1024, "min": 64, "max": 4096, "step": 8, "tooltip": _SIZE_HELP}),
                "count": ("INT", {"default": 0, "min": 0, "max": 4096, "tooltip": _COUNT_HELP}),
            }
        }

    def images(self, dataset: CaptionDataset, size: int, count: int) -> dict[str, Any]:
        entries = [*dataset.entries, *dataset.validation, *dataset.regularisation][: count or None]
        pixels = [fit_image(np.asarray(open_image(entry.image)), size, size) for entry in entries]
        captions = "\n".join(entry.caption for entry in entries)
        text = f"{len(pixels)} image{'s' * (len(pixels) != 1)} of {size} x {size} pixels\n{captions}"
        return show((to_image(pixels), captions, len(pixels)), text, pixels[:SHOWN])
