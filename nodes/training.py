from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from ..sdxl_lora_core.base_model import SDXLBase
from ..sdxl_lora_core.config import LR_SCHEDULES, PRECISIONS, SWITCHES, TARGET_MODULES, TrainConfig, default
from ..sdxl_lora_core.dataset import CaptionDataset
from ..sdxl_lora_core.runs import RunFolders
from ..sdxl_lora_core.training import train
from ..sdxl_lora_core.training_loop import StepReport
from . import folders, host
from .previews import show
from .wires import CATEGORY, Widget, to_image, train_config, widget


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
        "The weights, for ComfyUI's own Load LoRA Model and Save LoRA nodes.",
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
                "lora_name": widget(
                    TrainConfig, "lora_name", "STRING",
                    "File name of the LoRA. If another LoRA has it, a number is appended; nothing is overwritten.",
                ),
                "steps": widget(
                    TrainConfig, "steps", "INT",
                    "Number of weight updates. About 50 to 100 per image is a usual start.",
                    min=1, max=1_000_000,
                ),
                "learning_rate": widget(
                    TrainConfig, "learning_rate", "FLOAT",
                    "Size of each update. Lower it if images turn noisy or burnt, raise it if little is learned.",
                    min=1e-8, max=1.0, step=1e-5, round=False,
                ),
                "rank": widget(
                    TrainConfig, "rank", "INT",
                    "Capacity of the LoRA. 4 to 16 for a style, 16 to 64 for much detail; file size grows with it.",
                    min=1, max=1024,
                ),
                "alpha": widget(
                    TrainConfig, "alpha", "FLOAT",
                    "The LoRA acts with alpha / rank. Larger learns faster, like a larger learning rate.",
                    min=0.001, max=4096.0, step=1.0, round=False,
                ),
                "batch_size": widget(
                    TrainConfig, "batch_size", "INT",
                    "Images per pass. More is steadier and needs more memory.",
                    min=1, max=256,
                ),
                "seed": widget(
                    TrainConfig, "seed", "INT",
                    "Decides the start values, the order of images and the noise. The same seed repeats a run.",
                    min=0, max=2**64 - 1, control_after_generate=False,
                ),
                "sample_prompts": (
                    "STRING",
                    {
                        "default": "\n".join(default(TrainConfig, "sample_prompts")),
                        "multiline": True,
                        "tooltip": "One prompt a line; the finished LoRA draws each once. Empty: none.",
                    },
                ),
            },
            "optional": {
                "options": ("TRAIN_OPTIONS", {"tooltip": "Further settings from option nodes."}),
                **_advanced(),
            },
        }  # fmt: skip

    def train(
        self, base: SDXLBase, dataset: CaptionDataset, options: Mapping[str, Any] | None = None, **settings: Any
    ) -> dict[str, Any]:
        config = train_config(options, settings)
        with host.training_mode(), host.parts() as parts, host.progress() as progress:

            def on_step(step: StepReport) -> None:
                loss = "" if step.loss is None else f"loss {step.loss:.4f}"
                progress(step.done, step.total, step.phase, loss)

            result = train(
                base, dataset, config,
                folders=_run_folders(), device=host.device(), on_step=on_step, parts=parts,
            )  # fmt: skip
        chart = np.asarray(Image.open(result.loss_chart).convert("RGB"))
        samples = to_image(result.samples) if result.samples else host.nothing()
        report = json.dumps(result.report, indent=2)
        stack = [(result.lora_name, 1.0, 1.0)]
        outputs = (stack, result.lora_name, result.state_dict, to_image([chart]), samples, report)
        return show(outputs, report, [chart, *result.samples])


def _advanced() -> dict[str, Widget]:
    return {
        "gradient_accumulation": widget(
            TrainConfig, "gradient_accumulation", "INT",
            "Passes per update: acts like a larger batch without its memory.",
            min=1, max=1024, advanced=True,
        ),
        "lr_schedule": widget(
            TrainConfig, "lr_schedule", LR_SCHEDULES,
            "How the learning rate goes over the run: it stays, falls linearly, or falls along a cosine.",
            advanced=True,
        ),
        "lr_warmup_steps": widget(
            TrainConfig, "lr_warmup_steps", "INT",
            "The learning rate rises from 0 over this many steps.",
            min=0, max=1_000_000, advanced=True,
        ),
        "target_modules": widget(
            TrainConfig, "target_modules", TARGET_MODULES,
            "The UNet layers that learn: attention is the usual choice, more layers learn more and make larger files.",
            advanced=True,
        ),
        "dropout": widget(
            TrainConfig, "dropout", "FLOAT",
            "Share of the LoRA's inputs left out at random in training, against overfitting.",
            min=0.0, max=0.9, step=0.05, advanced=True,
        ),
        "caption_dropout": widget(
            TrainConfig, "caption_dropout", "FLOAT",
            "Share of training images shown without their caption.",
            min=0.0, max=1.0, step=0.05, advanced=True,
        ),
        "precision": widget(
            TrainConfig, "precision", PRECISIONS,
            "Number format of the frozen weights while training; the LoRA itself learns in fp32. "
            "auto: bf16 or fp16 on a GPU, fp32 on the CPU.",
            advanced=True,
        ),
        "gradient_checkpointing": widget(
            TrainConfig, "gradient_checkpointing", SWITCHES,
            "Less memory for more time. auto: only where the memory is too small otherwise.",
            advanced=True,
        ),
    }  # fmt: skip


def _run_folders() -> RunFolders:
    output = host.output_folder()
    return RunFolders(
        loras=output / "loras", runs=output / "lora_runs", cache=host.cache_folder(), taken=folders.lora_name_taken
    )
