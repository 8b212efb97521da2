"""A base with LoRAs in its weights, written as a model of its own: one file, or a diffusers folder."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import canonical_json, next_names, safe_path
from ..safetensors_file import first_names, read_header, save_tensors
from ..sdxl.base import TOKENIZERS, SDXLBase, scheduler_config
from ..sdxl.checkpoint_names import published_names
from ..sdxl.detection import PART_CLASSES, PIPELINE
from ..sdxl.loading import ENCODERS, PARTS, Part, save_encoder
from ..sdxl.precision import DTYPES
from .config import SaveBaseConfig
from .saving import write_once
from .stack import StackEntry, fit_of, load_merged

OnPart = Callable[[int, int], object]  # parts done, of how many


def save_merged_base(
    base: SDXLBase,
    stack: Sequence[StackEntry],
    config: SaveBaseConfig,
    folder: Path,
    taken: Callable[[str], bool],
    on_part: OnPart = lambda done, total: None,
) -> tuple[Path, list[str]]:
    """The new model in `folder`, under the next name that is free, and how much of each LoRA fitted.

    `taken` says whether a model of that file or folder name exists anywhere. A folder is written a part at a time.
    Raises ValueError for a LoRA that does not fit, and for values that `precision` cannot hold.
    """
    if config.layout == "single_file":
        fit: list[str] = []

        def write(file: Path) -> None:
            _write_file(file, base, stack, config, fit, on_part)

        return write_once(folder, config.base_name, taken, write), fit
    return _write_folder(base, stack, config, folder, taken, on_part)


def _part(base: SDXLBase, part: Part, stack: Sequence[StackEntry], config: SaveBaseConfig) -> nn.Module:
    """The same bits that generation has at this precision."""
    module = load_merged(base, part, DTYPES[config.precision], stack)
    bad = [name for name, tensor in module.state_dict().items() if not tensor.isfinite().all()]
    if bad:
        wide = "bf16 or fp32" if config.precision == "fp16" else "lower strengths"
        raise ValueError(f"{first_names(bad)} of the {part} would hold infinity in {config.precision}: take {wide}")
    return module


def _write_file(
    file: Path, base: SDXLBase, stack: Sequence[StackEntry], config: SaveBaseConfig, fit: list[str], on_part: OnPart
) -> None:
    tensors = {}
    for done, part in enumerate(PARTS):
        on_part(done, len(PARTS))
        module = _part(base, part, stack, config)
        fit += fit_of(module)
        tensors |= published_names(part, module.state_dict())
    if base.prediction_type == "v_prediction":
        tensors["v_pred"] = torch.tensor([])  # how checkpoints say it
    if base.zero_terminal_snr:
        tensors["ztsnr"] = torch.tensor([])
    save_tensors(file, tensors, _metadata(base, stack, config))
    on_part(len(PARTS), len(PARTS))


def _write_folder(
    base: SDXLBase,
    stack: Sequence[StackEntry],
    config: SaveBaseConfig,
    folder: Path,
    taken: Callable[[str], bool],
    on_part: OnPart,
) -> tuple[Path, list[str]]:
    temporary = safe_path(folder, config.base_name)
    temporary = temporary.with_name(f".{temporary.name}.{uuid.uuid4().hex}")
    fit: list[str] = []
    try:
        for done, part in enumerate(PARTS):
            on_part(done, len(PARTS))
            module: Any = _part(base, part, stack, config)
            fit += fit_of(module)
            if part in ENCODERS:
                save_encoder(module, temporary / part)
            else:
                module.save_pretrained(temporary / part, safe_serialization=True)
        for name in TOKENIZERS:
            shutil.copytree(base.configs / name, temporary / name)
        scheduler = {"_class_name": "EulerDiscreteScheduler", **scheduler_config(base)}
        _write_json(temporary / "scheduler" / "scheduler_config.json", scheduler)
        _write_json(temporary / "sdxl_lora.json", _recipe(stack))
        _write_json(temporary / "model_index.json", _index())
        on_part(len(PARTS), len(PARTS))
        for name in next_names(config.base_name):
            path = safe_path(folder, name)
            if not path.exists() and not taken(name):
                os.rename(temporary, path)
                return path, fit
        raise AssertionError("unreachable: names never end")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _index() -> dict[str, Any]:
    library = dict.fromkeys(PART_CLASSES, "transformers") | {"unet": "diffusers", "vae": "diffusers"}
    return {
        "_class_name": PIPELINE,
        "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        **{part: [library[part], name] for part, name in PART_CLASSES.items()},
        **{name: ["transformers", "CLIPTokenizer"] for name in TOKENIZERS},
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")


def _metadata(base: SDXLBase, stack: Sequence[StackEntry], config: SaveBaseConfig) -> dict[str, str]:
    """What the base's file says of itself, and what was merged into it."""
    own = dict(read_header(base.path).metadata) if base.layout == "single_file" else {}
    for key in ("modelspec.hash_sha256", "modelspec.thumbnail"):
        own.pop(key, None)
    names = [base.name, *(Path(entry.ref.name).stem for entry in stack)]
    return own | {
        "modelspec.sai_model_spec": own.get("modelspec.sai_model_spec", "1.0.0"),
        "modelspec.architecture": own.get("modelspec.architecture", "stable-diffusion-xl-v1-base"),
        "modelspec.title": config.base_name,
        "modelspec.prediction_type": "v" if base.prediction_type == "v_prediction" else "epsilon",
        "modelspec.merged_from": ", ".join(names),
        "sdxl_lora.recipe": canonical_json(_recipe(stack)),
    }


def _recipe(stack: Sequence[StackEntry]) -> dict[str, Any]:
    return {"loras": [entry.identity for entry in stack]}
