from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..sdxl_lora_core.evaluation.variants import Axis, Variant, make_variants, parse_axis
from ..sdxl_lora_core.sdxl.base import SDXLBase, size_note
from . import choices
from .compare_loras import summary
from .comparison import (
    SAVE_HELP,
    VariantProgress,
    advanced_widgets,
    clip_metric,
    generate_config,
    image_model_widget,
    prompt_widgets,
    similarity_metric,
)
from .generation import generation_context
from .host.folders import output_folder
from .host.memory import loaded_parts
from .host.progress import Progress
from .models import NO_MODEL, check_models, model_content
from .previews import Column, show, table
from .references import INPUTS, read_references
from .scoring import CLIP_HELP
from .widgets import lines, link
from .wires import CATEGORY, read_stack, stack_entry, to_image

if TYPE_CHECKING:
    from ..sdxl_lora_core.evaluation.choice import Choice

_NOVEL_HELP = (
    "Prompts, one per line, of subjects that the data does not have, in the style or with the trigger word: a LoRA "
    "that only memorised fails there."
)
_STACK_HELP = "The trained LoRA, alone or last in a stack."


class _ChooseVariant:
    """Chooses between variants of the last LoRA of a stack."""

    CATEGORY = CATEGORY
    RETURN_TYPES = ("LORA_STACK", "IMAGE", "IMAGE", "STRING")
    RETURN_NAMES = ("lora_stack", "grid", "chart", "report")
    OUTPUT_NODE = True
    FUNCTION = "choose"
    AXIS: dict[str, Any]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "base": link("SDXL_BASE", "The model, from Load SDXL Base."),
                "lora_stack": link("LORA_STACK", _STACK_HELP),
                **cls.AXIS,
                **prompt_widgets(),
                "novel_prompt": ("STRING", {"default": "", "multiline": True, "tooltip": _NOVEL_HELP}),
                "clip_model": choices.combo("clip", CLIP_HELP),
                "image_model": image_model_widget(),
                "save_as": ("STRING", {"default": "choice", "tooltip": SAVE_HELP}),
            },
            "optional": {
                "references": INPUTS["references"],
                "dataset": INPUTS["dataset"],
                **advanced_widgets(),
            },
            "hidden": {"graph": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, clip_model: str | None = None, image_model: str | None = None) -> bool | str:
        return check_models({"clip": clip_model, "encoder": image_model})

    @classmethod
    def IS_CHANGED(cls, clip_model: str | None = None, image_model: str | None = None, **inputs: Any) -> str:
        return model_content({"clip": clip_model, "encoder": image_model})


class PickCheckpoint(_ChooseVariant):
    """Picks the best of the LoRAs that a training kept along the way."""

    DESCRIPTION = (
        "Generates the same prompts and seeds with the LoRA of every kept step, scores how well they follow the "
        "prompts and how similar they are to held-out images, flags those that memorised, and passes the best one on. "
        "Train with save_every."
    )
    SEARCH_ALIASES = ["best checkpoint", "best epoch", "overfitting", "pick epoch", "compare checkpoints"]
    OUTPUT_TOOLTIPS = (
        "The stack with the best LoRA in place of the last one.",
        "All images in a labelled grid.",
        "The scores by step: adherence against similarity, and the overall score with intervals.",
        "Everything in numbers, as JSON.",
    )
    AXIS = {
        "checkpoints": (
            "STRING",
            {
                "default": "all",
                "tooltip": "all, or steps such as `200, 400, last`. last is the finished LoRA.",
            },
        )
    }

    def choose(self, base: SDXLBase, checkpoints: str, **inputs: Any) -> dict[str, Any]:
        return _choose(base, parse_axis(f"checkpoint: {checkpoints}"), inputs, in_rounds=False)


class FindStrength(_ChooseVariant):
    """Finds the strength at which a LoRA is best."""

    DESCRIPTION = (
        "Generates the same prompts and seeds at several strengths, with few seeds first and more for those that the "
        "intervals do not tell apart, and passes the LoRA on at the best strength."
    )
    SEARCH_ALIASES = ["lora strength", "best strength", "strength test", "lora weight"]
    OUTPUT_TOOLTIPS = (
        "The stack with the last LoRA at the best strength.",
        "All images in a labelled grid. A strength that was clearly worse got fewer seeds.",
        "The scores by strength.",
        "Everything in numbers, as JSON.",
    )
    AXIS = {
        "strengths": (
            "STRING",
            {
                "default": "0.4, 0.6, 0.8, 1, 1.2",
                "tooltip": "The strengths to compare. They replace that of the last LoRA.",
            },
        )
    }

    def choose(self, base: SDXLBase, strengths: str, **inputs: Any) -> dict[str, Any]:
        return _choose(base, parse_axis(f"strength: {strengths}"), inputs, in_rounds=True)


def _choose(base: SDXLBase, axis: Axis | None, inputs: dict[str, Any], in_rounds: bool) -> dict[str, Any]:
    from ..sdxl_lora_core.evaluation.choice import choose, criteria, find_memorised
    from ..sdxl_lora_core.evaluation.comparison import ComparisonJob, compare
    from ..sdxl_lora_core.evaluation.strength_search import rounds_in_words, search

    stack = read_stack(inputs["lora_stack"])
    variants = make_variants(choices.lora_refs(stack), axis, None, choices.lora_files())
    known, novel = generate_config(inputs), lines(inputs["novel_prompt"])
    config = replace(known, prompt="\n".join([*known.prompts, *novel]))
    found, notes = read_references(inputs)
    with loaded_parts() as parts, Progress() as progress:
        progress.note(size_note(base, max(config.width, config.height), "width and height"))
        adherence = clip_metric(parts, progress, inputs["clip_model"])
        similarity = similarity_metric(parts, progress, inputs.get("image_model", NO_MODEL), found, notes)
        job = ComparisonJob(base, config, variants, criteria(adherence, similarity, known.prompts, novel))
        said = VariantProgress(progress)
        context = replace(generation_context(parts, progress, inputs), on_detail=said.on_detail)
        if in_rounds:
            compared, rounds = search(job, context, said.on_variant)
            notes.append(f"Rounds: {rounds_in_words(rounds)}.")
        else:
            compared = compare(job, context, said.on_variant)
    memorised = find_memorised(compared, found)
    return _outputs(choose(replace(compared, notes=tuple(notes)), memorised), stack, inputs["save_as"])


def _outputs(choice: Choice, stack: Sequence[Any], name: str) -> dict[str, Any]:
    from ..sdxl_lora_core.evaluation.choice_chart import choice_chart
    from ..sdxl_lora_core.evaluation.saving import save_comparison

    report, chart = choice.to_json(), choice_chart(choice)
    saved = save_comparison(choice.comparison, output_folder() / "comparisons", name, report)
    best: Variant = choice.comparison.results[choice.best].variant
    chosen = [*stack[:-1], stack_entry(best.loras[-1])]
    outputs = (chosen, to_image([saved.grid]), to_image([chart]), report)
    columns: list[Column] = [("name", "variant", None)]
    columns += [(metric, metric.replace("_", " "), 2) for metric in choice.comparison.titles]
    columns += [("memorised", "copies", None)] if choice.memorisation else []
    shown = table([*columns, ("flag", "", None)], choice.rows())
    text = summary(choice.comparison, saved.page, choice.sentences())
    pictures: list[np.ndarray] = [chart, saved.grid]
    return show(outputs, text, pictures, table=shown)
