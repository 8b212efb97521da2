from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..sdxl_lora_core.evaluation.references import References
from ..sdxl_lora_core.evaluation.similarity import Features, SimilarityReport, compare_images
from ..sdxl_lora_core.evaluation.similarity_sheet import nearest_pairs
from . import choices
from .host.comfy import nothing
from .host.memory import loaded_parts
from .host.progress import Progress
from .models import check_models, held_model, model_content
from .previews import Column, show, table
from .references import INPUTS, read_references
from .widgets import link
from .wires import CATEGORY, from_image, to_image

ENCODER_HELP = (
    "An image model folder in models/clip_score or models/clip_vision: DINO or DINOv2 for subjects, CLIP for content "
    "and style. The bundled one knows only the bundled shapes."
)


class ImageSimilarity:
    """Measures how similar images are to references, how different from each other, and finds copies."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Measures how similar images are to held-out references (CLIP-I, DINO), how diverse they are, and which "
        "training image each is nearest to, with a flag for those that were memorised."
    )
    SEARCH_ALIASES = ["clip-i", "dino score", "image similarity", "overfitting", "memorization", "diversity", "lpips"]
    RETURN_TYPES = ("IMAGE", "FLOAT", "FLOAT", "FLOAT", "INT", "IMAGE", "STRING")
    RETURN_NAMES = ("images", "scores", "mean", "diversity", "memorised", "nearest", "report")
    OUTPUT_IS_LIST = (False, True, False, False, False, False, False)
    OUTPUT_TOOLTIPS = (
        "The images, those most similar to the references first. Without references in their order.",
        "The similarities, in the order of images, 0 to 1. Without references, connected nodes do not run.",
        "The mean similarity. Without references, connected nodes do not run.",
        "How different the images are from each other: 0 if they are equal.",
        "How many images are nearer to a training image than any held-out image is. Without a dataset, connected nodes "
        "do not run.",
        "Each image beside its nearest training image. Without a dataset, connected nodes do not run.",
        "All similarities, as JSON.",
    )
    OUTPUT_NODE = True
    FUNCTION = "compare"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "images": link("IMAGE", "The images to compare."),
                "image_model": choices.combo("encoder", ENCODER_HELP),
            },
            "optional": INPUTS,
        }

    @classmethod
    def VALIDATE_INPUTS(cls, image_model: str | None = None) -> bool | str:
        return check_models({"encoder": image_model})

    @classmethod
    def IS_CHANGED(cls, image_model: str | None = None, **settings: Any) -> str:
        return model_content({"encoder": image_model})

    def compare(self, images: Tensor, image_model: str, **inputs: Any) -> dict[str, Any]:
        found, notes = read_references(inputs)
        with loaded_parts() as parts, Progress() as progress:
            path, load = held_model(parts, "encoder", image_model)
            features = Features(path, parts.device, load, progress.during("comparing"))
            report = compare_images(from_image(images), features, found)
        return _outputs(images, report, found, notes)


def _outputs(images: Tensor, report: SimilarityReport, found: References, notes: list[str]) -> dict[str, Any]:
    order = list(report.order)
    pixels = from_image(images)
    scores = [report.to_references[index] for index in order] if report.to_references else nothing()
    pairs = to_image(nearest_pairs(pixels, report.copies, found)) if report.copies else None
    outputs = (
        images[order],
        scores,
        nothing() if math.isnan(report.mean) else report.mean,
        report.diversity,
        report.copies.count if report.copies else nothing(),
        nothing() if pairs is None else pairs,
        json.dumps(report.as_json(found.training_names), ensure_ascii=False, indent=1, allow_nan=False),
    )
    shown: Sequence[np.ndarray] = () if pairs is None else from_image(pairs)
    return show(outputs, "\n".join([*report.sentences(), *notes]), shown, table=_table(report, found))


def _table(report: SimilarityReport, found: References) -> list[dict[str, Any]]:
    columns: list[Column] = [("number", "image", None)]
    if report.to_references:
        columns.append(("similarity", "similarity", 3))
    if report.copies:
        columns += [("nearest", "nearest training image", None), ("correlation", "correlation", 3), ("flag", "", None)]
    rows = report.rows(found.training_names)
    shown = [{**row, "number": row["image"] + 1, "flag": "memorised" * row.get("memorised", False)} for row in rows]
    return table(columns, [shown[index] for index in report.order])
