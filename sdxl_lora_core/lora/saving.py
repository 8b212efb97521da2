"""Saves a stack of LoRAs as one file: resized, in another format, or merged. Nothing is ever overwritten."""

from __future__ import annotations

import filecmp
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files import canonical_json, claim_name, flush_to_disk, require_file_names, safe_path, temporary_beside
from ..sdxl.precision import DTYPES
from .config import MergeLoRAsConfig, SaveLoRAConfig
from .files import write_lora
from .merge_loras import OnModule, Reduction, combine, resize, single
from .metadata import IMPLEMENTATIONS, read_tag_counts, trigger_words
from .modules import LoRAFile
from .stack import StackEntry

_RECIPE = "sdxl_lora.recipe"
_OF_ONE_FILE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "modelspec.thumbnail", _RECIPE)


def save_lora(
    stack: Sequence[StackEntry],
    config: SaveLoRAConfig,
    folder: Path,
    taken: Callable[[str], bool],
    on_module: OnModule = lambda done, total: None,
) -> Path:
    """Saves the stack as one file with the same effect. A single LoRA keeps its kind, several become one LoRA.

    `taken` says whether a file name exists in any folder of LoRAs. A file with equal content under the name is reused.
    Raises ValueError for an empty stack, and for LoRAs that cannot be added up or written in the format.
    """
    _require_some(stack)
    require_file_names(folder, {"lora_name": config.lora_name})
    merged = single(stack[0]) if len(stack) == 1 else combine(stack, "concatenate", 0)
    file = resize(merged, config.rank, config.energy, on_module) if config.rank or config.energy < 1 else merged
    recipe = {key: value for key, value in asdict(config).items() if key in ("rank", "energy")}
    return _write(file, stack, recipe, config, folder, taken)


def merge_loras(
    stack: Sequence[StackEntry],
    config: MergeLoRAsConfig,
    folder: Path,
    taken: Callable[[str], bool],
    on_module: OnModule = lambda done, total: None,
) -> Path:
    """As save_lora, merged by `config.method`. The strengths of the stack are the weights."""
    _require_some(stack)
    require_file_names(folder, {"lora_name": config.lora_name})
    reduction = Reduction(config.density, config.seed)
    file = combine(stack, config.method, config.rank, reduction, on_module)
    used = {
        "concatenate": (),
        "linear": (),
        "svd": ("rank",),
        "ties": ("rank", "density"),
    }.get(config.method, ("rank", "density", "seed"))
    recipe = {key: value for key, value in asdict(config).items() if key in ("method", *used)}
    return _write(file, stack, recipe, config, folder, taken)


def _require_some(stack: Sequence[StackEntry]) -> None:
    if not stack:
        raise ValueError("lora_stack has no LoRA with a strength: connect Load LoRA or Train SDXL LoRA")


def _write(
    file: LoRAFile,
    stack: Sequence[StackEntry],
    recipe: Mapping[str, Any],
    config: SaveLoRAConfig | MergeLoRAsConfig,
    folder: Path,
    taken: Callable[[str], bool],
) -> Path:
    if not any(file.parts().values()) and not file.tokens:
        raise ValueError("nothing of the stack is left to save: every strength is 0")
    recipe = {**recipe, "loras": [entry.identity for entry in stack]}
    file.metadata = saved_metadata(file, stack, config, recipe)
    dtype = DTYPES[config.precision]
    return write_once(folder, config.lora_name, taken, lambda path: write_lora(path, file, dtype, config.format))


def saved_metadata(
    file: LoRAFile, stack: Sequence[StackEntry], config: SaveLoRAConfig | MergeLoRAsConfig, recipe: Mapping[str, Any]
) -> dict[str, str]:
    """The metadata that all LoRAs agree on, the trigger words and tags of all of them, and the recipe."""
    sources = [entry.file.metadata for entry in stack]
    common = {key: value for key, value in sources[0].items() if all(other.get(key) == value for other in sources)}
    kept = {key: value for key, value in common.items() if key not in _OF_ONE_FILE}
    modules = [module for found in file.parts().values() for module in found.values() if module.rank]
    ranks, alphas = ({getattr(module, what) for module in modules} for what in ("rank", "alpha"))
    title = config.lora_name.rpartition("/")[2]
    values: dict[str, Any] = {
        "ss_base_model_version": kept.get("ss_base_model_version", "sdxl_base_v1-0"),
        "ss_network_module": kept.get("ss_network_module", "networks.lora"),
        "ss_network_dim": max(ranks) if ranks else None,
        "ss_network_alpha": max(alphas) if alphas else None,
        "ss_output_name": title,
        "modelspec.sai_model_spec": kept.get("modelspec.sai_model_spec", "1.0.0"),
        "modelspec.architecture": kept.get("modelspec.architecture", "stable-diffusion-xl-v1-base/lora"),
        "modelspec.implementation": IMPLEMENTATIONS[config.format],
        "modelspec.title": title,
        "modelspec.merged_from": ", ".join(_plain(entry.ref.name) for entry in stack),
        _RECIPE: canonical_json(recipe),
    }
    if words := list(dict.fromkeys(word for source in sources for word in trigger_words(source))):
        values["modelspec.trigger_phrase"] = ", ".join(words)
    if len(sources) > 1 and (tags := _all_tags(sources)):
        values["ss_tag_frequency"] = canonical_json(tags)
    return {**kept, **{key: str(value) for key, value in values.items()}}


def _plain(name: str) -> str:
    """Without folders, which may reveal something about the machine."""
    return name.replace("\\", "/").rpartition("/")[2].removesuffix(".safetensors")


def _all_tags(sources: Sequence[Mapping[str, str]]) -> dict[str, dict[str, int]]:
    tags: dict[str, Counter[str]] = {}
    for source in sources:
        for folder, counts in read_tag_counts(source).items():
            tags.setdefault(folder, Counter()).update(counts)
    return {folder: dict(counts) for folder, counts in tags.items()}


def write_once(folder: Path, name: str, taken: Callable[[str], bool], write: Callable[[Path], object]) -> Path:
    """Writes `name`.safetensors into the folder, under the next free name, unless a file with equal bytes exists.

    Raises ValueError for a name outside the folder.
    """
    temporary = temporary_beside(safe_path(folder, f"{name}.safetensors"))
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        flush_to_disk(temporary)
        return claim_name(name, lambda candidate: _move(temporary, folder, f"{candidate}.safetensors", taken))
    finally:
        temporary.unlink(missing_ok=True)


def _move(temporary: Path, folder: Path, file_name: str, taken: Callable[[str], bool]) -> Path | None:
    path = safe_path(folder, file_name)
    if path.is_file() and filecmp.cmp(temporary, path, shallow=False):
        return path
    if taken(file_name) or not _created(path):
        return None
    os.replace(temporary, path)
    return path


def _created(path: Path) -> bool:
    """Whether this process, and no other, has created the file."""
    try:
        path.open("xb").close()
    except FileExistsError:
        return False
    return True
