from __future__ import annotations

import functools
from typing import Any

from ..sdxl_lora_core.cache import maintenance
from .host.folders import cache_folders
from .host.progress import Progress
from .previews import show
from .wires import CATEGORY

_ACTION_HELP = (
    "prune: deletes the least recently used images until the rest fits the limit. verify: reads every image and "
    "deletes damaged ones, which are generated again when needed."
)
_LIMIT_HELP = (
    "Maximum size of the cached images in GB from now on. It is stored with the cache and applies to every ComfyUI "
    "that shares it. 0 keeps the present limit."
)


class SDXLImageCache:
    """Shows the contents of the image cache, and reduces its size."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Shows how many generated images are cached on disk and how much space they take, sets the limit, and deletes "
        "the least recently used ones."
    )
    SEARCH_ALIASES = ["cache size", "disk space", "prune cache", "cached images", "clean up"]
    RETURN_TYPES = ("STRING", "INT", "FLOAT")
    RETURN_NAMES = ("report", "images", "gigabytes")
    OUTPUT_TOOLTIPS = ("The text that the node shows.", "The number of cached images.", "Their size in GB.")
    OUTPUT_NODE = True
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        limit = {"default": 0.0, "min": 0.0, "max": 1e6, "step": 1.0, "round": False, "tooltip": _LIMIT_HELP}
        return {
            "required": {
                "action": (["show", "prune", "verify"], {"default": "show", "tooltip": _ACTION_HELP}),
                "limit_gb": ("FLOAT", limit),
            }
        }

    @classmethod
    def IS_CHANGED(cls, **widgets: Any) -> float:
        return float("nan")  # the cache changes independently of this node

    def run(self, action: str, limit_gb: float) -> dict[str, Any]:
        images = cache_folders().images
        if limit_gb:
            maintenance.set_limit(images, limit_gb)
        done = []
        if action == "prune":
            done.append(str(maintenance.prune(images)))
        if action == "verify":
            with Progress() as progress:
                damaged = maintenance.verify(images, True, functools.partial(progress, phase="reading"))
            done.append(f"{maintenance.damage(damaged)} removed")
        stats = maintenance.stats(images)
        report = "\n".join([*done, str(stats)])
        return show((report, stats.images, stats.size / maintenance.GB), report)
