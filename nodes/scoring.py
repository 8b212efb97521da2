from __future__ import annotations

from typing import Any

from torch import Tensor

from ..sdxl_lora_core.evaluation.clip_model import load_clip
from ..sdxl_lora_core.evaluation.clip_score import annotate, score_images
from . import choices
from .host.memory import loaded_parts
from .previews import show
from .wires import CATEGORY, from_image, to_image


class CLIPScore:
    """Measures how well images fit their prompts."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Measures with a CLIP model how well images fit a prompt, 0 to 100, and sorts them best first. "
        "Compare scores of one CLIP model only with each other."
    )
    SEARCH_ALIASES = ["clip score", "clip similarity", "rank images", "best image", "evaluate lora", "image quality"]
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
        return {
            "required": {
                "images": ("IMAGE", {"tooltip": "The images to score."}),
                "prompt": (
                    "STRING",
                    {
                        "default": "",
                        "multiline": True,
                        "tooltip": "What they should show: one line for all images, or one line for each.",
                    },
                ),
                "clip_model": (
                    choices.names("clip"),
                    {
                        "tooltip": "A CLIP model folder in models/clip_score or models/clip_vision (config.json, "
                        "tokenizer, .safetensors). The bundled one knows only the bundled shapes."
                    },
                ),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, clip_model: str | None = None) -> bool | str:
        return choices.check("clip", clip_model)

    @classmethod
    def IS_CHANGED(cls, clip_model: str | None = None, **settings: Any) -> str:
        return choices.content("clip", clip_model, choices.stamp)

    def score(self, images: Tensor, prompt: str, clip_model: str) -> dict[str, Any]:
        pixels = from_image(images)
        texts = prompt.strip().splitlines() or [""]
        path = choices.find("clip", clip_model)
        with loaded_parts() as parts:
            key = f"{path} {choices.stamp(path)}"
            report = score_images(
                pixels,
                texts,
                path,
                parts.device,
                load=lambda folder: parts.borrow("clip", key, lambda: load_clip(folder)),
            )
        ordered = [pixels[index] for index in report.order]
        annotated = [annotate(pixels, report)[index] for index in report.order]
        scores = [report.scores[index].clip_score for index in report.order]
        outputs = (to_image(ordered), to_image(ordered[:1]), report.mean, scores, to_image(annotated), report.to_json())
        summary = f"mean {report.mean:.2f}, best {scores[0]:.2f}"
        return show(outputs, "\n".join([summary, *report.warnings]), annotated)
