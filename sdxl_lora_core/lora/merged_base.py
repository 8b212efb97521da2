"""Saves a base with merged LoRAs as a model of its own: one file, or a diffusers folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import canonical_json, claim_name, require_file_names, safe_path, temporary_beside
from ..safetensors_file import first_names, read_header, save_tensors
from ..sdxl.base import SDXLBase, require_sdxl, require_vae, scheduler_config
from ..sdxl.checkpoint_names import published_names
from ..sdxl.detection import PART_CLASSES
from ..sdxl.family import ENCODERS, PARTS, SDXL, Part
from ..sdxl.loading import save_encoder
from ..sdxl.precision import DTYPES
from .config import SaveBaseConfig
from .saving import write_once
from .stack import StackEntry
from .stacked_part import StackedPart

OnPart = Callable[[int, int], object]  # parts done, of how many


def save_merged_base(
    base: SDXLBase,
    stack: Sequence[StackEntry],
    config: SaveBaseConfig,
    folder: Path,
    taken: Callable[[str], bool],
    on_part: OnPart = lambda done, total: None,
) -> tuple[Path, list[str]]:
    """Saves the base with the LoRAs merged, under the next free name in `folder`.

    Returns its path and a line for each LoRA: how many of its modules fit. `taken` says whether a model of that file or
    folder name exists anywhere. A folder is written part by part.
    Raises ValueError for a LoRA that does not fit, and for values that `precision` cannot represent.
    """
    require_file_names(folder, {"base_name": config.base_name})
    require_sdxl(base, "saving a merged base")
    require_vae(base)
    merged = _MergedBase(base, stack, config, on_part)
    if config.layout == "single_file":
        return write_once(folder, config.base_name, taken, merged.write_file), merged.fit
    return merged.write_folder(folder, taken), merged.fit


@dataclass(frozen=True)
class _MergedBase:
    """A base with its LoRAs, to be written. `fit` is filled while its parts are merged."""

    base: SDXLBase
    stack: Sequence[StackEntry]
    config: SaveBaseConfig
    on_part: OnPart
    fit: list[str] = field(default_factory=list)

    def parts(self) -> Iterator[tuple[Part, nn.Module]]:
        """Each part, with the same bits as in generation at this precision."""
        for done, part in enumerate(PARTS):
            self.on_part(done, len(PARTS))
            merged = StackedPart(self.base, part, DTYPES[self.config.precision], self.stack).load()
            self._require_finite(part, merged.module)
            self.fit.extend(merged.state.fit)
            yield part, merged.module

    def _require_finite(self, part: Part, module: nn.Module) -> None:
        bad = [name for name, tensor in module.state_dict().items() if not tensor.isfinite().all()]
        if bad:
            precision = self.config.precision
            remedy = "precision bf16 or fp32" if precision == "fp16" else "lower strengths"
            raise ValueError(f"{first_names(bad)} of the {part} would be infinite in {precision}: choose {remedy}")

    def write_file(self, file: Path) -> None:
        tensors = {}
        for part, module in self.parts():
            tensors |= published_names(part, module.state_dict())
        if self.base.prediction_type == "v_prediction":
            tensors["v_pred"] = torch.tensor([])  # the markers that checkpoints use
        if self.base.zero_terminal_snr:
            tensors["ztsnr"] = torch.tensor([])
        save_tensors(file, tensors, _metadata(self.base, self.stack, self.config))
        read_header(file)
        self.on_part(len(PARTS), len(PARTS))

    def write_folder(self, folder: Path, taken: Callable[[str], bool]) -> Path:
        temporary = temporary_beside(safe_path(folder, self.config.base_name))
        try:
            for part, module in self.parts():
                _save_part(part, module, temporary / part)
            self._write_settings(temporary)
            self.on_part(len(PARTS), len(PARTS))
            return claim_name(self.config.base_name, lambda name: _rename(temporary, safe_path(folder, name), taken))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _write_settings(self, folder: Path) -> None:
        for name in SDXL.tokenizers:
            shutil.copytree(self.base.configs / name, folder / name)
        scheduler = {"_class_name": "EulerDiscreteScheduler", **scheduler_config(self.base)}
        _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        _write_json(folder / "sdxl_lora.json", _recipe(self.stack))
        _write_json(folder / "model_index.json", _index())


def _save_part(part: Part, module: Any, folder: Path) -> None:
    if part in ENCODERS:
        save_encoder(module, folder)
    else:
        module.save_pretrained(folder, safe_serialization=True)


def _rename(temporary: Path, path: Path, taken: Callable[[str], bool]) -> Path | None:
    if path.exists() or taken(path.name):
        return None
    os.rename(temporary, path)
    return path


def _index() -> dict[str, Any]:
    library = dict.fromkeys(PART_CLASSES, "transformers") | {"unet": "diffusers", "vae": "diffusers"}
    return {
        "_class_name": SDXL.pipeline,
        "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        **{part: [library[part], name] for part, name in PART_CLASSES.items()},
        **{name: ["transformers", "CLIPTokenizer"] for name in SDXL.tokenizers},
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")


def _metadata(base: SDXLBase, stack: Sequence[StackEntry], config: SaveBaseConfig) -> dict[str, str]:
    """The base's own metadata, and what was merged into it."""
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
