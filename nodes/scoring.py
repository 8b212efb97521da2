from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from ..sdxl_lora_core.evaluation.clip_score import ScoreReport, annotate, score_images, with_recalls
from ..sdxl_lora_core.evaluation.config import ScoreConfig
from ..sdxl_lora_core.evaluation.tag_recall import Tagger
from ..sdxl_lora_core.images.lazy import Lazy
from . import choices
from .host.memory import loaded_parts
from .host.progress import Progress
from .models import NO_MODEL, check_models, held_model, model_content
from .previews import Column, show, table
from .widgets import link, settings_in, widgets
from .wires import CATEGORY, from_image, to_image

SHOWN = 64  # images on the node
CLIP_HELP = (
    "A CLIP or SigLIP model folder in models/clip_score or models/clip_vision (config.json, tokenizer, .safetensors). "
    "The bundled one knows only the bundled shapes."
)
TAGGER_HELP = (
    "An image classifier's folder, in the same places, that knows the tags of your prompts: the report then says which "
    "tags it finds in each image. CLIP does not know booru tags."
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
                "clip_model": choices.combo("clip", CLIP_HELP),
            },
            "optional": {
                "tagger": choices.combo("classifier", TAGGER_HELP, first=NO_MODEL, advanced=True),
                **widgets(ScoreConfig, ("scale", "tag_threshold"), advanced=True),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, clip_model: str | None = None, tagger: str | None = None) -> bool | str:
        return check_models({"clip": clip_model, "classifier": tagger})

    @classmethod
    def IS_CHANGED(cls, clip_model: str | None = None, tagger: str | None = None, **settings: Any) -> str:
        return model_content({"clip": clip_model, "classifier": tagger})

    def score(
        self, images: Tensor, prompt: str, clip_model: str, tagger: str = NO_MODEL, **settings: Any
    ) -> dict[str, Any]:
        config = ScoreConfig(**settings_in(ScoreConfig, settings))
        pixels, texts = from_image(images), prompt.strip().splitlines() or [""]
        with loaded_parts() as parts, Progress() as progress:
            path, load = held_model(parts, "clip", clip_model)
            report = score_images(pixels, texts, path, parts.device, load, progress.during("scoring"))
            report = replace(report, scale=config.scale)
            if tagger != NO_MODEL:
                folder, load = held_model(parts, "classifier", tagger)
                counting = Tagger(folder, config.tag_threshold, parts.device, load)
                report = with_recalls(report, pixels, counting, progress.during("tagging"))
        return _outputs(images, pixels, report)


def _outputs(images: Tensor, pixels: Sequence[np.ndarray], report: ScoreReport) -> dict[str, Any]:
    order = list(report.order)
    strips = annotate(pixels, report)
    annotated = to_image(Lazy(len(order), lambda place: strips[order[place]]))
    scores = [report.values[index] for index in order]
    outputs = (images[order], images[order[:1]], report.mean, scores, annotated, report.to_json())
    return show(outputs, _text(report), from_image(annotated[:SHOWN]), table=_table(report))


def _text(report: ScoreReport) -> str:
    digits = 1 if report.scale == "clip_score" else 3
    best = report.values[report.order[0]]
    lines = [
        f"The mean CLIP score of {len(report.scores)} images is {report.mean:.{digits}f}, the best {best:.{digits}f}."
    ]
    if report.recalls:
        lines.append(f"Of the tags of the prompts, {report.mean_recall:.0%} are found in the images.")
    if len(report.scores) > SHOWN:
        lines.append(f"The best {SHOWN} are shown.")
    return "\n".join([*lines, *report.warnings])


def _table(report: ScoreReport) -> list[dict[str, Any]]:
    """Best first."""
    rows = report.rows()
    recall: list[Column] = [("tag_recall", "tags", 2)] if report.recalls else []
    digits = 2 if report.scale == "clip_score" else 3
    columns = [("rank", "#", None), ("number", "image", None), (report.scale, "CLIP", digits), *recall]
    numbered = [rows[index] | {"number": index + 1} for index in report.order]
    return table([*columns, ("prompt", "prompt", None)], numbered)
