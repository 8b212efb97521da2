from __future__ import annotations

import json
from typing import Any

from ..sdxl_lora_core.dataset.caption_dataset import CaptionDataset
from .host.folders import output_folder
from .host.progress import Progress
from .previews import show
from .widgets import link, save_help
from .wires import CATEGORY, to_image


class DatasetReport:
    """Says what is wrong with a dataset before it is trained on."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Checks images and captions before training: duplicates, blurred and tiny images, captions that are cut, tags, "
        "and words that will fuse with the trigger word."
    )
    SEARCH_ALIASES = ["check dataset", "dataset audit", "duplicates", "tag frequency", "caption check", "blurry images"]
    RETURN_TYPES = ("CAPTION_DATASET", "IMAGE", "STRING")
    RETURN_NAMES = ("dataset", "chart", "report")
    OUTPUT_TOOLTIPS = (
        "The connected dataset, unchanged.",
        "Sizes, buckets, caption lengths and tags.",
        "All findings, measures and tags, as JSON.",
    )
    OUTPUT_NODE = True
    FUNCTION = "report"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        help = save_help("datasets", "HTML page, chart and JSON")
        return {
            "required": {
                "dataset": link("CAPTION_DATASET", "The dataset, from Load Caption Dataset."),
                "save_as": ("STRING", {"default": "dataset", "tooltip": help}),
            }
        }

    def report(self, dataset: CaptionDataset, save_as: str) -> dict[str, Any]:
        from ..sdxl_lora_core.dataset.audit import audit
        from ..sdxl_lora_core.dataset.audit_chart import audit_chart
        from ..sdxl_lora_core.evaluation.dataset_page import save_audit
        from ..sdxl_lora_core.text.caption_length import caption_length

        with Progress() as progress:
            found = audit(dataset, caption_length, progress.during("checking images"))
        chart = audit_chart(found)
        page = save_audit(found, chart, output_folder() / "datasets", save_as)
        text = [*found.sentences(), f"saved: {page.relative_to(output_folder()).as_posix()} in the output folder"]
        outputs = (dataset, to_image([chart]), json.dumps(found.as_json(), ensure_ascii=False, indent=1))
        return show(outputs, "\n".join(text), [chart])
