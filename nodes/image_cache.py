from __future__ import annotations

import functools
from typing import Any

from ..sdxl_lora_core.cache import maintenance
from .host.folders import cache_folder
from .host.progress import Progress
from .previews import show
from .wires import CATEGORY


class SDXLImageCache:
    """Shows what the image cache holds, and makes it smaller."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Shows how many generated images are kept on disk and how much room they take, sets the limit, and removes "
        "what was not used for longest."
    )
    SEARCH_ALIASES = ["cache size", "disk space", "prune cache", "cached images", "clean up"]
    RETURN_TYPES = ("STRING", "INT", "FLOAT")
    RETURN_NAMES = ("report", "images", "gigabytes")
    OUTPUT_TOOLTIPS = ("What the node shows.", "How many images are kept.", "How much room they take, in GB.")
    OUTPUT_NODE = True
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "action": (
                    ["show", "prune", "verify"],
                    {
                        "default": "show",
                        "tooltip": "prune: remove what was not used for longest until the rest fits the limit. "
                        "verify: read every image and remove damaged ones. They are made anew when asked for.",
                    },
                ),
                "limit_gb": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 1e6,
                        "step": 1.0,
                        "round": False,
                        "tooltip": "The room that the images may take from now on, in GB. It is kept with the cache "
                        "and holds for every ComfyUI that shares it. 0 leaves it as it is.",
                    },
                ),
            }
        }

    @classmethod
    def IS_CHANGED(cls, **widgets: Any) -> float:
        return float("nan")  # the cache changes without this node

    def run(self, action: str, limit_gb: float) -> dict[str, Any]:
        images = cache_folder() / "images"
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
