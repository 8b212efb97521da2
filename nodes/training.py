from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from ..sdxl_lora_core.dataset.caption_dataset import CaptionDataset
from ..sdxl_lora_core.sdxl.base import SDXLBase
from ..sdxl_lora_core.training.config.presets import PRESETS, Preset
from ..sdxl_lora_core.training.monitor.progress import StepReport
from ..sdxl_lora_core.training.run.runs import RunFolders
from . import choices
from .host.comfy import nothing
from .host.folders import cache_folder, output_folder
from .host.memory import device, loaded_parts, training_mode
from .host.progress import Progress
from .host.server import stop_button
from .previews import show
from .widgets import train_config, train_widget
from .wires import CATEGORY, to_image

_FACE = ("lora_name", "steps", "learning_rate", "rank", "alpha", "batch_size", "seed", "sample_prompts")
_ADVANCED = (
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
    "A starting point for a kind of job. It fills every setting that still stands at its default, here and on option "
    "nodes; run.yaml shows the result."
)


class TrainSDXLLoRA:
    """Trains a LoRA, continues an interrupted run, or finds a finished one again."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Trains an SDXL LoRA on captioned images and saves it to output/loras. The same settings and images find the "
        "finished LoRA again; an interrupted run continues where it stopped."
    )
    SEARCH_ALIASES = ["train lora", "lora training", "finetune", "dreambooth", "kohya", "fine-tune sdxl"]
    RETURN_TYPES = ("LORA_STACK", "STRING", "LORA_MODEL", "IMAGE", "IMAGE", "STRING")
    RETURN_NAMES = ("lora_stack", "lora_name", "lora", "loss_chart", "samples", "report")
    OUTPUT_TOOLTIPS = (
        "The trained LoRA at strength 1, for SDXL Generate (cached) or Load LoRA (SDXL).",
        "The file's name inside the loras folder.",
        "What the UNet learned, for ComfyUI's own Load LoRA Model and Save LoRA nodes; what text encoders learned is "
        "in the file only.",
        "The loss over the steps.",
        "An image for each sample prompt. Without sample prompts nothing connected here runs.",
        "What was trained and how it went, as JSON.",
    )
    OUTPUT_NODE = True
    FUNCTION = "train"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "base": ("SDXL_BASE", {"tooltip": "The model to train on, from Load SDXL Base."}),
                "dataset": ("CAPTION_DATASET", {"tooltip": "The images, from Load Caption Dataset."}),
                **{option: train_widget(option) for option in _FACE},
            },
            "optional": {
                "options": ("TRAIN_OPTIONS", {"tooltip": "Further settings from option nodes."}),
                **{option: train_widget(option, advanced=True) for option in _ADVANCED},
                "preset": (list(PRESETS), {"default": "none", "tooltip": _PRESET_HELP, "advanced": True}),
                "validation": (
                    "CAPTION_DATASET",
                    {"tooltip": "Images to validate with and never to train on, from a second Load Caption Dataset."},
                ),
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
        from ..sdxl_lora_core.training.train import train  # a third of the engine, which no start of ComfyUI needs

        config = train_config(options, settings, preset)
        if config.continue_from:
            config = replace(config, continue_from=str(choices.find("lora", config.continue_from)))
        if config.clip_model:
            config = replace(config, clip_model=str(choices.find("clip", config.clip_model)))
        with training_mode(), loaded_parts() as parts, Progress() as progress, stop_button.offered() as should_stop:

            def on_step(step: StepReport) -> None:
                progress(step.done, step.total, step.phase, step.detail, step.preview)

            result = train(
                base,
                dataset,
                config,
                folders=_run_folders(),
                device=device(),
                on_step=on_step,
                should_stop=should_stop,
                parts=parts,
                validation=validation,
            )
        chart = np.asarray(Image.open(result.loss_chart).convert("RGB"))
        samples = to_image(result.samples) if result.samples else nothing()
        report = json.dumps(result.report, indent=2)
        stack = [(result.lora_name, 1.0, 1.0)]
        outputs = (stack, result.lora_name, result.state_dict, to_image([chart]), samples, report)
        return show(outputs, report, [chart, *result.samples])


def _run_folders() -> RunFolders:
    output = output_folder()
    return RunFolders(
        loras=output / "loras", runs=output / "lora_runs", cache=cache_folder(), taken=choices.lora_name_taken
    )
