from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ..sdxl_lora_core.evaluation.clip_model import load_clip
from ..sdxl_lora_core.evaluation.clip_score import ScoreReport, annotate, score_images
from ..sdxl_lora_core.files import stat_fingerprint
from ..sdxl_lora_core.runtime.loaded_parts import Loaded, PartRequest
from . import choices
from .host.memory import loaded_parts
from .previews import show
from .widgets import link
from .wires import CATEGORY, from_image, to_image

_CLIP_HELP = (
    "A CLIP model folder in models/clip_score or models/clip_vision (config.json, tokenizer, .safetensors). The "
    "bundled one knows only the bundled shapes."
)


class CLIPScore:
    """Measures how well images match their prompts."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Measures with a CLIP model how well images match a prompt, 0 to 100, and sorts them best first. "
        "Compare only scores of the same CLIP model."
    )
    SEARCH_ALIASES = ["clip score", "clip similarity", "rank images", "best image", "evaluate lora", "compare loras"]
    RETURN_TYPES = ("IMAGE", "IMAGE", "FLOAT", "FLOAT", "IMAGE", "STRING")
    RETURN_NAMES = ("images", "best", "mean", "scores", "annotated", "report")
    OUTPUT_IS_LIST = (False, False, False, True, False, False)
    OUTPUT_TOOLTIPS = (
        "The images, best first.",
        "The image with the highest score.",
        "The mean score.",
        "The scores, in the order of images.",
        "The images with their scores written on them, best first.",
        "Scores, prompts and warnings, as JSON.",
    )
    OUTPUT_NODE = True
    FUNCTION = "score"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        prompt_help = "The texts to score against: one line for all images, or one line for each."
        return {
            "required": {
                "images": link("IMAGE", "The images to score."),
                "prompt": ("STRING", {"default": "", "multiline": True, "tooltip": prompt_help}),
                "clip_model": choices.combo("clip", _CLIP_HELP),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, clip_model: str | None = None) -> bool | str:
        return choices.check("clip", clip_model)

    @classmethod
    def IS_CHANGED(cls, clip_model: str | None = None, **settings: Any) -> str:
        return choices.content("clip", clip_model)

    def score(self, images: Tensor, prompt: str, clip_model: str) -> dict[str, Any]:
        pixels, path = from_image(images), choices.find("clip", clip_model)
        with loaded_parts() as parts:
            request = PartRequest("clip", f"{path} {stat_fingerprint(path)}", lambda: Loaded(load_clip(path)))
            texts = prompt.strip().splitlines() or [""]
            report = score_images(pixels, texts, path, parts.device, load=lambda _: parts.borrow(request).module)
        return _outputs(pixels, report)


def _outputs(pixels: list[np.ndarray], report: ScoreReport) -> dict[str, Any]:
    ordered = [pixels[index] for index in report.order]
    annotated = [annotate(pixels, report)[index] for index in report.order]
    scores = [report.scores[index].clip_score for index in report.order]
    outputs = (to_image(ordered), to_image(ordered[:1]), report.mean, scores, to_image(annotated), report.to_json())
    summary = f"The mean CLIP score of {len(scores)} images is {report.mean:.1f}, the best is {scores[0]:.1f}."
    return show(outputs, "\n".join([summary, *report.warnings]), annotated, scores=_rows(report))


def _rows(report: ScoreReport) -> list[dict[str, Any]]:
    """The rows of the node's table, best first."""
    rows = report.rows()
    return [{name: rows[index][name] for name in ("rank", "image", "prompt", "clip_score")} for index in report.order]
