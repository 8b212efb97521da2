from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..sdxl_lora_core.evaluation.variants import Variant, make_variants, parse_axis, read_settings, stack_name
from ..sdxl_lora_core.generation.config import GenerateConfig
from ..sdxl_lora_core.lora.stack import LoRARef
from ..sdxl_lora_core.sdxl.base import SDXLBase, size_note
from . import choices
from .comparison import (
    SAVE_HELP,
    VariantProgress,
    advanced_widgets,
    clip_metric,
    generate_config,
    image_model_widget,
    prompt_widgets,
    similarity_metric,
    tag_metric,
)
from .generation import generation_context
from .host.comfy import nothing
from .host.folders import output_folder
from .host.memory import loaded_parts
from .host.progress import Progress
from .models import NO_MODEL, check_models, model_content
from .previews import Column, show, table
from .references import INPUTS, read_references
from .scoring import CLIP_HELP, TAGGER_HELP
from .widgets import link
from .wires import CATEGORY, from_image, read_stack, stack_entry, to_image

if TYPE_CHECKING:
    from ..sdxl_lora_core.evaluation.comparison import Comparison, Metric
    from ..sdxl_lora_core.evaluation.saving import SavedComparison

_AXIS_HELP = (
    "What changes from {place}, and its values: `strength: 0.5, 0.75, 1`, `checkpoint: all`, `lora: a, b`, "
    "`blocks: mid_block=0 | up_blocks.0=0.5`, or a setting of SDXL Generate such as `steps: 10, 25` or "
    "`sampler: euler, dpmpp_2m`. Empty: nothing."
)
_VARIANT_COLUMNS: list[Column] = [
    ("name", "variant", None),
    ("mean", "mean", 2),
    ("deviation", "deviation", 2),
    ("difference", "to base", 2),
    ("interval", "95 % interval", None),
    ("wins", "won", 2),
    ("verdict", "", None),
]


class CompareVariant:
    """Adds a variant to a comparison: a stack of LoRAs, other settings, another base, or given images."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Adds a variant to Compare LoRAs: a stack of LoRAs, other settings of generation, another base, or images from "
        "elsewhere. Chain several."
    )
    SEARCH_ALIASES = ["compare variant", "xy plot input", "ab test", "add variant"]
    RETURN_TYPES = ("COMPARE_VARIANTS",)
    RETURN_NAMES = ("variants",)
    OUTPUT_TOOLTIPS = ("The variants so far, with this one.",)
    FUNCTION = "add"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        name_help = "The name in tables and grid. Empty: the names of the LoRAs."
        settings_help = "Settings of generation that differ, as in `steps=20, sampler=euler`. Empty: none."
        return {
            "required": {
                "name": ("STRING", {"default": "", "tooltip": name_help}),
                "settings": ("STRING", {"default": "", "tooltip": settings_help}),
            },
            "optional": {
                "variants": link("COMPARE_VARIANTS", "The variants before this one."),
                "lora_stack": link("LORA_STACK", "The LoRAs of this variant."),
                "images": link(
                    "IMAGE",
                    "Images of this variant, of another program too, instead of generating them: for each prompt one "
                    "for each seed.",
                ),
                "base": link("SDXL_BASE", "Another base for this variant, such as from Load SD 1.5 Base."),
            },
        }

    def add(
        self,
        name: str,
        settings: str,
        variants: Sequence[Variant] = (),
        lora_stack: Any = None,
        images: Tensor | None = None,
        base: SDXLBase | None = None,
    ) -> tuple[tuple[Variant, ...]]:
        loras = tuple(choices.lora_refs(read_stack(lora_stack)))
        name = name.strip() or _variant_name(loras, images, base)
        given = None if images is None else from_image(images)
        return ((*variants, Variant(name, loras, read_settings(settings, name), given, base=base)),)


def _variant_name(loras: Sequence[LoRARef], images: Tensor | None, base: SDXLBase | None) -> str:
    if images is not None:
        return "images"
    names = [base.name] if base else []
    return " + ".join([*names, stack_name(loras)] if loras or not names else names)


class CompareLoRAs:
    """Compares LoRAs, checkpoints, strengths and settings over the same prompts and seeds."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Generates the same prompts and seeds without a LoRA and with each variant, scores them, and says which is "
        "better, with intervals: a labelled grid, a table, a chart, and one HTML page. Images come from the cache of "
        "SDXL Generate (cached)."
    )
    SEARCH_ALIASES = ["xy plot", "xyz grid", "compare loras", "ab test", "lora strength grid", "checkpoint grid"]
    RETURN_TYPES = ("IMAGE", "IMAGE", "IMAGE", "STRING", "STRING", "LORA_STACK", "COMPARISON")
    RETURN_NAMES = ("grid", "chart", "images", "table", "report", "best", "comparison")
    OUTPUT_IS_LIST = (False, False, True, False, False, False, False)
    OUTPUT_TOOLTIPS = (
        "All images in a labelled grid.",
        "Means and paired differences by variant. Without a score, connected nodes do not run.",
        "All images one by one: by variant, prompt and seed.",
        "A line for each image with its scores, as CSV.",
        "Everything in numbers, as JSON.",
        "The LoRAs of the variant with the highest mean of the first score.",
        "All images by variant, for Human Compare.",
    )
    OUTPUT_NODE = True
    FUNCTION = "compare"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        axes = {
            place: ("STRING", {"default": default, "tooltip": _AXIS_HELP.format(place=f"{place[:-1]} to {place[:-1]}")})
            for place, default in (("columns", "strength: 0.5, 1"), ("rows", ""))
        }
        return {
            "required": {
                "base": link("SDXL_BASE", "The model, from Load SDXL Base."),
                **prompt_widgets(),
                **axes,
                "clip_model": choices.combo("clip", CLIP_HELP),
                "image_model": image_model_widget(),
                "save_as": ("STRING", {"default": "comparison", "tooltip": SAVE_HELP}),
            },
            "optional": {
                "lora_stack": link("LORA_STACK", "The LoRAs to compare; the axes change the last one."),
                "variants": link("COMPARE_VARIANTS", "Further variants, from Compare: Add Variant."),
                "references": INPUTS["references"],
                "dataset": INPUTS["dataset"],
                "tagger": choices.combo("classifier", TAGGER_HELP, first=NO_MODEL, advanced=True),
                **advanced_widgets(),
            },
            "hidden": {"graph": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, clip_model: str | None = None, image_model: str | None = None, tagger: str | None = None
    ) -> bool | str:
        return check_models({"clip": clip_model, "encoder": image_model, "classifier": tagger})

    @classmethod
    def IS_CHANGED(
        cls, clip_model: str | None = None, image_model: str | None = None, tagger: str | None = None, **inputs: Any
    ) -> str:
        return model_content({"clip": clip_model, "encoder": image_model, "classifier": tagger})

    def compare(self, base: SDXLBase, columns: str, rows: str, save_as: str, **inputs: Any) -> dict[str, Any]:
        from ..sdxl_lora_core.evaluation.comparison import ComparisonJob, compare
        from ..sdxl_lora_core.evaluation.saving import save_comparison

        config = generate_config(inputs)
        loras = choices.lora_refs(read_stack(inputs.get("lora_stack")))
        made = make_variants(loras, parse_axis(columns), parse_axis(rows), choices.lora_files())
        variants = (*made, *inputs.get("variants", ()))
        with loaded_parts() as parts, Progress() as progress:
            progress.note(_size_notes(base, config, variants))
            metrics, notes = _metrics(parts, progress, variants, inputs)
            said = VariantProgress(progress)
            context = replace(generation_context(parts, progress, inputs), on_detail=said.on_detail)
            found = compare(ComparisonJob(base, config, variants, metrics), context, said.on_variant)
        found = replace(found, notes=notes)
        return _outputs(found, save_comparison(found, output_folder() / "comparisons", save_as))


def _size_notes(base: SDXLBase, config: GenerateConfig, variants: Sequence[Variant]) -> str:
    """What to say of images that are too large for their base, once each."""
    notes = []
    for variant in variants:
        own = variant.config(config)
        notes.append(size_note(variant.base or base, max(own.width, own.height), "width and height"))
    return "\n".join(filter(None, dict.fromkeys(notes)))


def _metrics(
    parts: Any, progress: Progress, variants: Sequence[Variant], inputs: dict[str, Any]
) -> tuple[tuple[Metric, ...], tuple[str, ...]]:
    """The scores that the node's models give, and notes. Raises ValueError for references that were trained on."""
    stack = [(lora.name, 1.0, 1.0) for variant in variants for lora in variant.loras]
    found, notes = read_references({**inputs, "lora_stack": stack})
    metrics = [clip_metric(parts, progress, inputs["clip_model"])]
    if (tagger := inputs.get("tagger", NO_MODEL)) != NO_MODEL:
        metrics.append(tag_metric(parts, progress, tagger))
    if similarity := similarity_metric(parts, progress, inputs.get("image_model", NO_MODEL), found, notes):
        metrics.append(similarity)
    return tuple(metrics), tuple(dict.fromkeys(notes))


def _outputs(found: Comparison, saved: SavedComparison) -> dict[str, Any]:
    from ..sdxl_lora_core.evaluation.comparison_report import table_rows

    metric = next(iter(found.titles))
    leader = found.leader(metric) or 0
    best = [stack_entry(lora) for lora in found.results[leader].variant.loras]
    cells = [to_image([cell.pixels]) for result in found.results for cell in result.cells if cell]
    charts = [] if saved.chart is None else [saved.chart]
    chart = to_image(charts) if charts else nothing()
    outputs = (to_image([saved.grid]), chart, cells, saved.images, saved.report, best, found)
    rows = [row | {"interval": interval_words(row.get("interval"))} for row in table_rows(found, metric)]
    shown = table(_VARIANT_COLUMNS, rows)
    return show(outputs, summary(found, saved.page), [saved.grid, *charts], table=shown)


def interval_words(interval: Sequence[float] | None) -> str:
    return "{:+.2f} to {:+.2f}".format(*interval) if interval else ""


def summary(found: Comparison, page: Path, sentences: Sequence[str] | None = None) -> str:
    """What the node says: the sentences of a comparison, how many images were made, and where the page is."""
    from ..sdxl_lora_core.evaluation import comparison_report

    images, cached = found.generated
    lines = comparison_report.sentences(found) if sentences is None else sentences
    counts = f"{images} images, {cached} from the cache"
    return "\n".join([*lines, counts, f"saved: {page.relative_to(output_folder()).as_posix()} in the output folder"])
