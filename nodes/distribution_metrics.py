from __future__ import annotations

import json
from typing import Any

from torch import Tensor

from ..sdxl_lora_core.evaluation.distribution import (
    DistributionReport,
    compare_distributions,
    inception_score,
)
from ..sdxl_lora_core.evaluation.similarity import Features
from ..sdxl_lora_core.vision.classifier import class_logits
from ..sdxl_lora_core.vision.model_folder import load_processor
from . import choices
from .host.comfy import nothing
from .host.memory import loaded_parts
from .host.progress import Progress
from .image_similarity import ENCODER_HELP
from .models import NO_MODEL, check_models, held_model, model_content
from .previews import show
from .references import INPUTS, read_references
from .widgets import link
from .wires import CATEGORY, from_image

_CLASSIFIER_HELP = "An image classifier's folder, in the same places, for the Inception Score of the images."


class DistributionMetrics:
    """Measures how far a set of images is from a set of references."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Measures how far a set of images is from a set of real ones: CMMD, KID with an interval, and FID, which needs "
        "thousands of images. Lower is nearer. Compare only values of the same model."
    )
    SEARCH_ALIASES = ["fid", "kid", "cmmd", "inception score", "frechet distance", "evaluate images"]
    RETURN_TYPES = ("FLOAT", "FLOAT", "FLOAT", "FLOAT", "STRING")
    RETURN_NAMES = ("cmmd", "kid", "fid", "inception_score", "report")
    OUTPUT_TOOLTIPS = (
        "CMMD: works from about a hundred images on.",
        "KID: works from about fifty images on; may be slightly below 0.",
        "FID: too high for fewer than ten thousand images.",
        "Inception Score of the images. Without a classifier, connected nodes do not run.",
        "All values with the interval of KID and warnings, as JSON.",
    )
    OUTPUT_NODE = True
    FUNCTION = "measure"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "images": link("IMAGE", "The images to measure."),
                "image_model": choices.combo("encoder", ENCODER_HELP),
            },
            "optional": {
                **INPUTS,
                "classifier": choices.combo("classifier", _CLASSIFIER_HELP, first=NO_MODEL, advanced=True),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, image_model: str | None = None, classifier: str | None = None) -> bool | str:
        return check_models({"encoder": image_model, "classifier": classifier})

    @classmethod
    def IS_CHANGED(cls, image_model: str | None = None, classifier: str | None = None, **settings: Any) -> str:
        return model_content({"encoder": image_model, "classifier": classifier})

    def measure(self, images: Tensor, image_model: str, classifier: str = NO_MODEL, **inputs: Any) -> dict[str, Any]:
        found, notes = read_references(inputs)
        if not len(found.held_out):
            raise ValueError(
                "there are no references: connect images to references, or a dataset with a validation_percent above 0"
            )
        pixels, score = from_image(images), None
        with loaded_parts() as parts, Progress() as progress:
            path, load = held_model(parts, "encoder", image_model)
            features = Features(path, parts.device, load, progress.during("comparing"))
            report = compare_distributions(features.raw(pixels), features.raw(found.held_out), features.name)
            if classifier != NO_MODEL:
                folder, load = held_model(parts, "classifier", classifier)
                model = load(folder)
                logits = class_logits(model, load_processor(folder, model), pixels, progress.during("classifying"))
                score = inception_score(logits)
        return _outputs(report, score, notes)


def _outputs(report: DistributionReport, score: float | None, notes: list[str]) -> dict[str, Any]:
    values = report.as_json() | {"inception_score": score}
    text = json.dumps(values, ensure_ascii=False, indent=1, allow_nan=False)
    outputs = (report.cmmd, report.kid, report.fid, nothing() if score is None else score, text)
    more = [] if score is None else [f"Inception Score {score:.3f}"]
    return show(outputs, "\n".join([*report.sentences(), *more, *notes]))
