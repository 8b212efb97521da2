from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..sdxl_lora_core.dataset.caption_dataset import CaptionDataset, with_validation
from ..sdxl_lora_core.sdxl.base import SDXLBase, size_note
from ..sdxl_lora_core.settings import without_effect
from ..sdxl_lora_core.training.config.presets import PRESETS, Preset
from ..sdxl_lora_core.training.config.train_config import TrainConfig
from ..sdxl_lora_core.training.run.runs import RunFolders
from . import choices
from .host.comfy import nothing
from .host.folders import cache_folders, output_folder
from .host.memory import device, device_memory, loaded_parts, training_mode
from .host.progress import Progress
from .host.server import stop_button
from .previews import show
from .widgets import link, train_config, widgets
from .wires import CATEGORY, to_image

if TYPE_CHECKING:
    from ..sdxl_lora_core.training.train import TrainResult

FACE = ("lora_name", "steps", "learning_rate", "rank", "alpha", "batch_size", "seed", "sample_prompts")
ADVANCED = (
    "gradient_accumulation",
    "lr_schedule",
    "lr_warmup_steps",
    "target_modules",
    "dropout",
    "caption_dropout",
    "precision",
    "gradient_checkpointing",
)
_PRESET_HELP = (
    "A starting point for a kind of job. It fills every setting that is at its default, here and on option nodes; "
    "run.yaml shows the result."
)
_VALIDATION_HELP = "Images to validate with and never to train on, from a second Load Caption Dataset."


class TrainSDXLLoRA:
    """Trains a LoRA, continues an interrupted run, or finds a finished one again."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Trains an SDXL LoRA on captioned images and saves it to output/loras. The same settings and images find the "
        "finished LoRA again; an interrupted run continues where it stopped."
    )
    SEARCH_ALIASES = ["train lora", "lora training", "finetune", "dreambooth", "kohya", "fine-tune sdxl", "trainer"]
    RETURN_TYPES = ("LORA_STACK", "STRING", "LORA_MODEL", "IMAGE", "IMAGE", "STRING")
    RETURN_NAMES = ("lora_stack", "lora_name", "lora", "loss_chart", "samples", "report")
    OUTPUT_TOOLTIPS = (
        "The trained LoRA at strength 1, for SDXL Generate (cached) or Load LoRA (SDXL).",
        "The file's name inside the loras folder.",
        "The weights for the UNet, for ComfyUI's own Load LoRA Model and Save LoRA nodes; those for text encoders are "
        "in the file only.",
        "The loss over the steps.",
        "An image for each sample prompt. Without sample prompts, connected nodes do not run.",
        "A report of the run, as JSON.",
    )
    OUTPUT_NODE = True
    FUNCTION = "train"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "base": link("SDXL_BASE", "The model to train on, from Load SDXL Base."),
                "dataset": link("CAPTION_DATASET", "The images, from Load Caption Dataset."),
                **widgets(TrainConfig, FACE),
            },
            "optional": {
                "options": link("TRAIN_OPTIONS", "Further settings from option nodes."),
                **widgets(TrainConfig, ADVANCED, advanced=True),
                "preset": (list(PRESETS), {"default": "none", "tooltip": _PRESET_HELP}),
                "validation": link("CAPTION_DATASET", _VALIDATION_HELP),
            },
        }

    def train(
        self,
        base: SDXLBase,
        dataset: CaptionDataset,
        options: Mapping[str, Any] | None = None,
        preset: Preset = "none",
        validation: CaptionDataset | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        config, left_out = train_config(options, settings, preset)
        dataset = with_validation(dataset, validation) if validation else dataset
        result = _train(base, dataset, _with_paths(config))
        return _outputs(result, [*left_out, *without_effect(config).values()])


def _train(base: SDXLBase, dataset: CaptionDataset, config: TrainConfig) -> TrainResult:
    # The training code is a third of the engine, which starting ComfyUI does not need.
    from ..sdxl_lora_core.training.job import RunContext, TrainingJob
    from ..sdxl_lora_core.training.train import train

    with training_mode(), loaded_parts() as parts, Progress() as progress, stop_button.offered() as should_stop:
        largest = max((entry.resolution for entry in dataset.entries), default=0)
        progress.note(size_note(base, largest, "resolution of Load Caption Dataset"))
        context = RunContext(
            _run_folders(), device(), progress.on_step, should_stop, progress.on_run, parts, device_memory()
        )
        return train(TrainingJob(base, dataset, config), context)


def _with_paths(config: TrainConfig) -> TrainConfig:
    """The config with paths in place of the names that the option nodes' combos offer."""
    kinds: dict[str, choices.Kind] = {"continue_from": "lora", "clip_model": "clip"}
    named: dict[str, choices.Kind] = {option: kind for option, kind in kinds.items() if getattr(config, option)}
    return replace(
        config, **{option: str(choices.find(kind, getattr(config, option))) for option, kind in named.items()}
    )


def _run_folders() -> RunFolders:
    output = output_folder()
    return RunFolders(
        loras=output / "loras", runs=output / "lora_runs", cache=cache_folders(), taken=choices.lora_name_taken
    )


def _outputs(result: TrainResult, notes: list[str]) -> dict[str, Any]:
    from ..sdxl_lora_core.training.report import describe_run

    charts = [np.asarray(Image.open(path).convert("RGB")) for path in (result.loss_chart, result.image_chart) if path]
    samples = to_image(result.samples) if result.samples else nothing()
    report = result.report.to_json()
    stack = [(result.lora_name, 1.0, 1.0)]
    outputs = (stack, result.lora_name, result.state_dict, to_image(charts[:1]), samples, report)
    text = "\n".join([describe_run(result.report, result.lora_path), *notes])
    return show(outputs, text, [*charts, *result.samples], report=[report])
