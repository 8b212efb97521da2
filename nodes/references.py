"""The inputs with which an evaluating node gets its reference images, and those that were trained on."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..sdxl_lora_core.dataset.caption_dataset import CaptionDataset
from ..sdxl_lora_core.evaluation.references import References, find_references
from . import choices
from .widgets import Widget, link
from .wires import from_image, read_stack

INPUTS: dict[str, Widget] = {
    "references": link("IMAGE", "Images of the same subject or style that were not trained on."),
    "dataset": link(
        "CAPTION_DATASET",
        "The dataset of the training. The images it holds out (validation_percent) are the references, unless others "
        "are connected; its training images are searched for copies.",
    ),
    "lora_stack": link("LORA_STACK", "The LoRAs that made the images: references they were trained on are refused."),
}


def read_references(inputs: dict[str, Any]) -> tuple[References, list[str]]:
    """The references of a node's inputs, and notes on what could not be checked.

    Raises ValueError naming references that were trained on.
    """
    images: Tensor | None = inputs.get("references")
    dataset: CaptionDataset | None = inputs.get("dataset")
    trained, unknown = choices.trained_images(read_stack(inputs.get("lora_stack")))
    found = find_references(None if images is None else from_image(images), dataset, trained)
    asked = unknown if len(found.held_out) else []
    return found, [f"It is not known on which images {name} was trained: it may know the references." for name in asked]
