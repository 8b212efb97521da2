from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..sdxl_lora_core.evaluation.config import FilterConfig
from ..sdxl_lora_core.evaluation.selection import select
from .host.comfy import nothing
from .previews import show
from .widgets import link, widgets
from .wires import CATEGORY, from_image


class FilterByScore:
    """Lets the images with the best scores pass."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Accepts the best images, or those above a threshold, by the scores of CLIP Score or Image Similarity. If none "
        "is accepted, the nodes connected to it do not run."
    )
    SEARCH_ALIASES = ["filter images", "best of n", "select best image", "threshold", "reject images"]
    INPUT_IS_LIST = True
    RETURN_TYPES = ("IMAGE", "IMAGE", "INT", "FLOAT")
    RETURN_NAMES = ("accepted", "rejected", "count", "scores")
    OUTPUT_IS_LIST = (False, False, False, True)
    OUTPUT_TOOLTIPS = (
        "The accepted images, best first. If there are none, connected nodes do not run.",
        "The other images, in their order. If there are none, connected nodes do not run.",
        "The number of accepted images.",
        "The scores of the accepted images.",
    )
    OUTPUT_NODE = True
    FUNCTION = "filter"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "images": link("IMAGE", "The images, in the order of the scores."),
                "scores": link("FLOAT", "A score for each image, from CLIP Score or Image Similarity."),
                **widgets(FilterConfig, ("keep", "best", "threshold")),
            }
        }

    def filter(self, images: list[Tensor], scores: list[float], **settings: list[Any]) -> dict[str, Any]:
        config = FilterConfig(**{name: values[0] for name, values in settings.items()})
        batch = _joined(images)
        if len(batch) != len(scores):
            raise ValueError(
                f"there are {len(batch)} images and {len(scores)} scores: connect both outputs of the same node"
            )
        found = select(scores, config)
        accepted, rejected = (_batch(batch, indices) for indices in (found.accepted, found.rejected))
        kept = [scores[index] for index in found.accepted] or nothing()
        shown = from_image(accepted) if found.accepted else ()
        return show((accepted, rejected, len(found.accepted), kept), found.summary, shown)


def _joined(images: list[Tensor]) -> Tensor:
    sizes = {tuple(batch.shape[1:]) for batch in images}
    if len(sizes) > 1:
        named = " and ".join(f"{width} x {height}" for height, width, *_ in sorted(sizes))
        raise ValueError(f"the images have different sizes ({named}): filter images of one size at a time")
    return images[0] if len(images) == 1 else torch.cat(images)


def _batch(images: Tensor, indices: tuple[int, ...]) -> Any:
    return images[list(indices)] if indices else nothing()
