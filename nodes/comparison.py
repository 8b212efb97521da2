"""What the comparing nodes share: settings of generation, metrics, and results on the node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..sdxl_lora_core.evaluation.config import ScoreConfig
from ..sdxl_lora_core.evaluation.tag_recall import Tagger
from ..sdxl_lora_core.generation.config import GenerateConfig
from ..sdxl_lora_core.runtime.loaded_parts import LoadedParts
from . import choices
from .host.progress import Progress
from .models import NO_MODEL, held_model
from .widgets import Widget, save_help, settings_in, widget, widgets

if TYPE_CHECKING:
    from ..sdxl_lora_core.evaluation.comparison import Metric
    from ..sdxl_lora_core.evaluation.references import References

PROMPTS = "a red circle on a navy background\na green star on a white background"
_PROMPT_HELP = "One prompt per line. Intervals are over the prompts: 8 or more show small differences."
_SEEDS_HELP = "Images per prompt, with consecutive seeds. Every variant has the same ones."
_MODEL_HELP = (
    "With references or a dataset: an image model folder (DINO, CLIP) by which images are compared with those held out "
    "of training. (none): prompts are scored only."
)
SAVE_HELP = save_help("comparisons", "HTML page, grid, chart, CSV and JSON")
_FACE = ("steps", "guidance", "width", "height")
_ADVANCED = (
    "negative_prompt",
    "sampler",
    "scheduler",
    "prompt_syntax",
    "batch_size",
    "long_prompts",
    "guidance_rescale",
)


def prompt_widgets() -> dict[str, Widget]:
    return {
        "prompt": widget(GenerateConfig, "prompt", default=PROMPTS, multiline=True, tooltip=_PROMPT_HELP),
        "seed": widget(GenerateConfig, "seed"),
        "count": widget(GenerateConfig, "count", default=2, tooltip=_SEEDS_HELP),
        **widgets(GenerateConfig, _FACE),
    }


def advanced_widgets() -> dict[str, Widget]:
    return widgets(GenerateConfig, _ADVANCED, advanced=True)


def image_model_widget() -> Widget:
    return choices.combo("encoder", _MODEL_HELP, first=NO_MODEL)


def generate_config(inputs: Mapping[str, Any]) -> GenerateConfig:
    return GenerateConfig(**settings_in(GenerateConfig, inputs) | {"prompt_per_line": True, "cache": "use"})


def clip_metric(parts: LoadedParts, progress: Progress, name: str) -> Metric:
    from ..sdxl_lora_core.evaluation.metrics import ClipAdherence

    path, load = held_model(parts, "clip", name)
    return ClipAdherence(path, parts.device, load, progress.during("scoring"))


def tag_metric(parts: LoadedParts, progress: Progress, name: str) -> Metric:
    from ..sdxl_lora_core.evaluation.metrics import TagAdherence

    path, load = held_model(parts, "classifier", name)
    threshold = ScoreConfig().tag_threshold
    return TagAdherence(Tagger(path, threshold, parts.device, load), progress.during("tagging"))


def similarity_metric(
    parts: LoadedParts, progress: Progress, name: str, found: References, notes: list[str]
) -> Metric | None:
    """Similarity to held-out images; None, with a note, if a model is chosen and there are none."""
    from ..sdxl_lora_core.evaluation.metrics import ReferenceSimilarity
    from ..sdxl_lora_core.evaluation.similarity import Features

    if name == NO_MODEL:
        return None
    if not len(found.held_out):
        notes.append("image_model is not used: no references are connected, and no dataset that holds images out.")
        return None
    path, load = held_model(parts, "encoder", name)
    return ReferenceSimilarity(Features(path, parts.device, load, progress.during("comparing")), found.held_out)


class VariantProgress:
    """Says on the node which variant is generated."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._variant = progress, ""

    def on_variant(self, done: int, total: int, name: str) -> None:
        self._variant = f"{name} ({done + 1} of {total})"

    def on_detail(self, words: str) -> None:
        self._progress.on_detail(f"{self._variant}: {words}")
