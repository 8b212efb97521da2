"""A stack of LoRAs written as one file: resized, in another format, or merged. Nothing is ever overwritten."""

from __future__ import annotations

import filecmp
import hashlib
import os
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files import canonical_json, flush_to_disk, next_names, safe_path
from ..sdxl.precision import DTYPES
from .config import FileFormat, MergeLoRAsConfig, SaveLoRAConfig
from .files import write_lora
from .merge_loras import OnModule, Reduction, Share, combine, resize, single
from .metadata import IMPLEMENTATIONS, read_tag_counts, trigger_words
from .modules import LoRAFile
from .stack import StackEntry

_RECIPE = "sdxl_lora.recipe"
_OF_ONE_FILE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "modelspec.thumbnail", _RECIPE)


@dataclass(frozen=True)
class Source:
    """A LoRA to be saved: as it takes part, and what tells it from others, as JSON values."""

    share: Share
    identity: Any


def sources_of(stack: Sequence[StackEntry]) -> list[Source]:
    return [Source(Share(entry.ref.name, entry.file, entry.strength_by_module), entry.identity) for entry in stack]


def source_of_file(name: str, file: LoRAFile) -> Source:
    """A LoRA that is in memory, at strength 1."""
    content = hashlib.sha256()
    for part, modules in file.parts().items():
        for path, module in sorted(modules.items()):
            content.update(f"{part}.{path} {module.alpha}".encode())
            for tensor in module.factors.values():
                content.update(tensor.float().contiguous().numpy().tobytes())
    return Source(Share(name, file, lambda _: lambda _: 1.0), [content.hexdigest(), 1.0, 1.0])


def save_lora(
    sources: Sequence[Source],
    config: SaveLoRAConfig,
    folder: Path,
    taken: Callable[[str], bool],
    on_module: OnModule = lambda done, total: None,
) -> Path:
    """The stack as one file that acts as all of them together. One LoRA keeps its kind, several become one LoRA.

    `taken` says whether a file name exists in any folder of LoRAs. Equal content under the wanted name is found again.
    Raises ValueError for an empty stack, and for what the format or a sum cannot hold.
    """
    shares = _shares(sources)
    whole = single(shares[0]) if len(shares) == 1 else combine(shares, "concatenate", 0)
    file = resize(whole, config.rank, config.energy, on_module) if config.rank or config.energy < 1 else whole
    recipe = {key: value for key, value in asdict(config).items() if key in ("rank", "energy")}
    return _write(file, sources, recipe, config, folder, taken)


def merge_loras(
    sources: Sequence[Source],
    config: MergeLoRAsConfig,
    folder: Path,
    taken: Callable[[str], bool],
    on_module: OnModule = lambda done, total: None,
) -> Path:
    """save_lora by a method of merging. The strengths of the stack are the weights."""
    reduction = Reduction(config.density, config.seed)
    file = combine(_shares(sources), config.method, config.rank, reduction, on_module)
    used = {
        "concatenate": (),
        "linear": (),
        "svd": ("rank",),
        "ties": ("rank", "density"),
    }.get(config.method, ("rank", "density", "seed"))
    recipe = {key: value for key, value in asdict(config).items() if key in ("method", *used)}
    return _write(file, sources, recipe, config, folder, taken)


def _shares(sources: Sequence[Source]) -> list[Share]:
    if not sources:
        raise ValueError("lora_stack brings no LoRA with a strength: connect Load LoRA or Train SDXL LoRA")
    return [source.share for source in sources]


def _write(
    file: LoRAFile,
    sources: Sequence[Source],
    recipe: Mapping[str, Any],
    config: SaveLoRAConfig | MergeLoRAsConfig,
    folder: Path,
    taken: Callable[[str], bool],
) -> Path:
    if not any(file.parts().values()) and not file.tokens:
        raise ValueError("nothing is left of the stack to be saved: every strength is 0")
    recipe = {**recipe, "loras": [source.identity for source in sources]}
    file.metadata = saved_metadata(file, [source.share for source in sources], config.lora_name, config.format, recipe)
    dtype = DTYPES[config.precision]
    return write_once(folder, config.lora_name, taken, lambda path: write_lora(path, file, dtype, config.format))


def saved_metadata(
    file: LoRAFile, shares: Sequence[Share], name: str, format: FileFormat, recipe: Mapping[str, Any]
) -> dict[str, str]:
    """What all LoRAs say alike, and of what they say differently the words and tags of all. And how it was made."""
    sources = [share.file.metadata for share in shares]
    common = {key: value for key, value in sources[0].items() if all(other.get(key) == value for other in sources)}
    kept = {key: value for key, value in common.items() if key not in _OF_ONE_FILE}
    modules = [module for found in file.parts().values() for module in found.values() if module.rank]
    ranks, alphas = ({getattr(module, what) for module in modules} for what in ("rank", "alpha"))
    title = name.rpartition("/")[2]
    values: dict[str, Any] = {
        "ss_base_model_version": kept.get("ss_base_model_version", "sdxl_base_v1-0"),
        "ss_network_module": kept.get("ss_network_module", "networks.lora"),
        "ss_network_dim": max(ranks) if ranks else None,
        "ss_network_alpha": max(alphas) if alphas else None,
        "ss_output_name": title,
        "modelspec.sai_model_spec": kept.get("modelspec.sai_model_spec", "1.0.0"),
        "modelspec.architecture": kept.get("modelspec.architecture", "stable-diffusion-xl-v1-base/lora"),
        "modelspec.implementation": IMPLEMENTATIONS[format],
        "modelspec.title": title,
        "modelspec.merged_from": ", ".join(_plain(share.name) for share in shares),
        _RECIPE: canonical_json(recipe),
    }
    if words := list(dict.fromkeys(word for source in sources for word in trigger_words(source))):
        values["modelspec.trigger_phrase"] = ", ".join(words)
    if len(sources) > 1 and (tags := _all_tags(sources)):
        values["ss_tag_frequency"] = canonical_json(tags)
    return {**kept, **{key: str(value) for key, value in values.items()}}


def _plain(name: str) -> str:
    """Without folders, which may tell of the machine."""
    return name.replace("\\", "/").rpartition("/")[2].removesuffix(".safetensors")


def _all_tags(sources: Sequence[Mapping[str, str]]) -> dict[str, dict[str, int]]:
    tags: dict[str, Counter[str]] = {}
    for source in sources:
        for folder, counts in read_tag_counts(source).items():
            tags.setdefault(folder, Counter()).update(counts)
    return {folder: dict(counts) for folder, counts in tags.items()}


def write_once(folder: Path, name: str, taken: Callable[[str], bool], write: Callable[[Path], object]) -> Path:
    """Writes `name`.safetensors into the folder, under the next name that is free. Equal bytes are found again.

    Raises ValueError for a name that leaves the folder.
    """
    temporary = safe_path(folder, f"{name}.safetensors")
    temporary = temporary.with_name(f".{temporary.name}.{uuid.uuid4().hex}")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        flush_to_disk(temporary)
        for candidate in next_names(name):
            path = safe_path(folder, f"{candidate}.safetensors")
            if path.is_file() and filecmp.cmp(temporary, path, shallow=False):
                return path
            if not taken(f"{candidate}.safetensors") and _claimed(path):
                os.replace(temporary, path)
                return path
        raise AssertionError("unreachable: names never end")
    finally:
        temporary.unlink(missing_ok=True)


def _claimed(path: Path) -> bool:
    """Whether this process is the one that made the file of this name."""
    try:
        path.open("xb").close()
    except FileExistsError:
        return False
    return True
