from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..sdxl_lora_core.captioning.config import CaptionConfig
from . import choices
from .host.folders import own_dataset_folder
from .host.memory import loaded_parts
from .host.progress import Progress
from .models import captioner_loaders
from .previews import show
from .widgets import link, settings_in, widgets
from .wires import CATEGORY, from_image

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from ..sdxl_lora_core.captioning.caption_folder import CaptionReport
    from ..sdxl_lora_core.captioning.captioner import Captioner

CONNECTED = "(connected captions)"
_CAPTIONER_HELP = (
    "What writes the captions: a folder in models/captioners, LLM, florence2 or blip with BLIP, BLIP-2 or Florence-2 "
    "of transformers, or a tagger (WD v3 as ONNX, or a classifier of transformers). (connected captions): those of "
    "another node."
)
_HUB_HELP = (
    "Downloads this model of the Hugging Face hub into models/captioners first, as in "
    "florence-community/Florence-2-base, and uses it. Empty: nothing is downloaded."
)
_FACE = ("trigger_word", "prefix", "suffix", "detail", "existing", "write_to")
_ADVANCED = ("prompt", "max_tokens", "beams", "batch_size", "tag_threshold", "character_threshold")


class CaptionImages:
    """Writes the captions of a folder of images."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Captions the images of a folder with a local model, a tagger, or the captions of another node, and writes "
        "them beside the images. Captions written by hand are never lost."
    )
    SEARCH_ALIASES = [
        "caption folder",
        "auto caption",
        "blip",
        "florence2",
        "wd14 tagger",
        "interrogate",
        "save captions",
    ]
    INPUT_IS_LIST = True
    RETURN_TYPES = ("STRING", "STRING", "STRING")
    RETURN_NAMES = ("folder", "captions", "report")
    OUTPUT_TOOLTIPS = (
        "The folder's name, for captioned_folder of Load Caption Dataset.",
        "One line for each image in the order of the folder, empty for one without a caption.",
        "Each caption, who wrote it, and what was skipped, as JSON.",
    )
    OUTPUT_NODE = True
    FUNCTION = "caption"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "folder": choices.combo("dataset", "A folder of images inside ComfyUI's input folder."),
                "captioner": choices.combo("captioner", _CAPTIONER_HELP, first=CONNECTED),
                **widgets(CaptionConfig, _FACE),
            },
            "optional": {
                "captions": link("STRING", "A caption for each image, from another node.", force=True),
                "images": link(
                    "IMAGE",
                    "The images of the folder that the connected captions were written for, in any order and size. "
                    "Without them the captions are in the order of the folder's names.",
                ),
                **widgets(CaptionConfig, _ADVANCED, advanced=True),
                "hub_id": ("STRING", {"default": "", "tooltip": _HUB_HELP, "advanced": True}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, folder: Any = None, captioner: Any = None) -> bool | str:
        found = choices.check("dataset", _first(folder))
        if found is not True or _first(captioner) in (None, CONNECTED):
            return found
        return choices.check("captioner", _first(captioner))

    @classmethod
    def IS_CHANGED(cls, folder: Any = None, captioner: Any = None, **settings: Any) -> str:
        name = _first(captioner)
        model = "" if name in (None, CONNECTED) else choices.content("captioner", name)
        return f"{choices.content('dataset', _first(folder))} {model}"

    def caption(self, captions: Sequence[str] = (), images: Sequence[Tensor] = (), **inputs: Any) -> dict[str, Any]:
        from ..sdxl_lora_core.captioning.caption_folder import caption_folder

        values = {name: _first(value) for name, value in inputs.items()}
        config = CaptionConfig(**settings_in(CaptionConfig, values))
        folder = own_dataset_folder(choices.find("dataset", values["folder"]))
        with loaded_parts() as parts, Progress() as progress:
            if _uses_connected(values):
                captioner = _connected(folder, captions, images, progress)
            else:
                captioner = _model(values, config, parts, progress)
            report = caption_folder(folder, captioner, config, progress.during("captioning"))
        return _outputs(values["folder"], report)


def _first(value: Any) -> Any:
    """The value of a widget, which comes as a list of one."""
    return value[0] if isinstance(value, list) else value


def _uses_connected(values: dict[str, Any]) -> bool:
    return values["captioner"] == CONNECTED and not values.get("hub_id", "").strip()


def _connected(folder: Path, captions: Sequence[str], images: Sequence[Tensor], progress: Progress) -> Captioner:
    from ..sdxl_lora_core.captioning.given import given_captions

    if not captions:
        raise ValueError(f"captioner is {CONNECTED} and captions is not connected: connect it, or choose a model")
    pixels: list[np.ndarray] = [one for image in images for one in from_image(image)]
    return given_captions(folder, captions, pixels or None, progress.during("finding images"))


def _model(values: dict[str, Any], config: CaptionConfig, parts: Any, progress: Progress) -> Captioner:
    from ..sdxl_lora_core.captioning.captioner import open_captioner
    from ..sdxl_lora_core.captioning.hub import download_model
    from .host.folders import roots

    if wanted := values.get("hub_id", "").strip():
        progress.note(f"downloading {wanted}")
        path = download_model(wanted, roots("captioners")[0])
    else:
        path = choices.find("captioner", values["captioner"])
    return open_captioner(path, config, parts.device, captioner_loaders(parts, path))


def _outputs(folder: str, report: CaptionReport) -> dict[str, Any]:
    text = "\n".join(report.sentences())
    lines = "\n".join(report.captions.get(key, "") for key in report.order)
    outputs = (folder, lines, json.dumps(report.as_json(), ensure_ascii=False, indent=1))
    columns = [("file", "image", None), ("caption", "caption", None), ("by", "by", None)]
    rows = [{**row, "prompt": row["caption"]} for row in report.as_json()["images"]]
    return show(outputs, text, table=[{"columns": [list(column) for column in columns], "rows": rows}])
