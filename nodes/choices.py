"""The names that widgets offer for datasets, bases, LoRAs, ControlNets and CLIP models, and their paths."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from ..sdxl_lora_core.dataset.trained_images import read_trained_images
from ..sdxl_lora_core.evaluation.variants import LoRAFiles
from ..sdxl_lora_core.files import safe_path, stat_fingerprint
from ..sdxl_lora_core.lora.stack import LoRARef, StackEntry, open_stack
from ..sdxl_lora_core.messages import shown
from .host.folders import cache_folders, file_names, input_folder, output_folder, roots
from .widgets import Widget
from .wires import read_stack, strengths_by_block

Kind = Literal[
    "dataset", "base", "sd15_base", "vae", "lora", "control_net", "clip", "encoder", "classifier", "captioner"
]

_ASSETS = Path(__file__).parent.parent / "assets"
_BUNDLED: dict[Kind, dict[str, Path]] = {
    "dataset": {"sample: 8-bit (bundled)": _ASSETS / "sample-dataset"},
    "base": {"tiny-sdxl (bundled)": _ASSETS / "tiny-sdxl"},
    "sd15_base": {},
    "vae": {},
    "lora": {f"{name} (bundled)": _ASSETS / "loras" / f"{name}.safetensors" for name in ("8bit_style", "line_style")},
    "control_net": {},
    "clip": {"tiny-clip (bundled)": _ASSETS / "tiny-clip"},
    "encoder": {"tiny-clip (bundled)": _ASSETS / "tiny-clip"},
    "classifier": {},
    "captioner": {},
}
_DATASETS = " [datasets]"
NONE = "(none)"  # of a combo whose file is optional
_SHOWN = 20  # names in a message
_MODEL = "a folder with config.json in the clip_score or clip_vision folder,"
_BASE = "a .safetensors file in the checkpoints folder, or a folder with model_index.json in the diffusers folder"
_EXPECTED: dict[Kind, str] = {
    "dataset": "a folder inside ComfyUI's input folder",
    "base": _BASE,
    "sd15_base": _BASE,
    "vae": "a .safetensors file, or a folder with config.json, in the vae folder",
    "lora": "a .safetensors file in the loras folder",
    "control_net": "a .safetensors file, or a folder with config.json, in the controlnet folder",
    "clip": f"{_MODEL} with a CLIP or SigLIP model",
    "encoder": f"{_MODEL} with an image model",
    "classifier": f"{_MODEL} with a tagger or another image classifier",
    "captioner": "a folder with config.json or model.onnx in the captioners folder",
}


def names(kind: Kind) -> list[str]:
    """The names that a combo offers, the bundled ones last."""
    return [*sorted(_found(kind)), *_BUNDLED[kind]]


def combo(kind: Kind, tooltip: str, first: str = "", **more: Any) -> Widget:
    """A combo of the names of a kind; `first`, an entry that is not a file, is the default."""
    if not first:
        return names(kind), {"tooltip": tooltip, **more}
    return [first, *names(kind)], {"default": first, "tooltip": tooltip, **more}


def find(kind: Kind, name: str) -> Path:
    """The file or folder of a name. Raises FileNotFoundError, or ValueError for a path outside its folder."""
    if not isinstance(name, str):
        raise ValueError(f"{shown(name)} is not a name: choose {_EXPECTED[kind]}")
    if name in _BUNDLED[kind]:
        return _BUNDLED[kind][name]
    found = _found(kind)
    for root in found.get(name, []):
        if os.path.exists(path := root / name.removesuffix(_DATASETS)):
            return path
    # Not in the list: a folder further down, a file that was just written, or another spelling of its path.
    searched = _typed(kind)
    inside = next((root for root in searched if Path(name).is_relative_to(root)), None)
    spelled = Path(name).relative_to(inside).as_posix() if inside else name.replace("\\", "/")
    for root in searched:
        for relative in (spelled, f"{spelled}.safetensors"):
            if os.path.exists(path := safe_path(root, relative)):  # Path.exists raises for a name that is too long
                return path
    offered = names(kind)
    others = f" and {len(offered) - _SHOWN} more" if len(offered) > _SHOWN else ""
    raise FileNotFoundError(
        f"{shown(name)} was not found: choose {_EXPECTED[kind]}. There are: {', '.join(offered[:_SHOWN])}{others}"
    )


def check(kind: Kind, name: str | None) -> bool | str:
    """For VALIDATE_INPUTS: True, or an error message. The name is None if the input is linked."""
    try:
        return name is None or find(kind, name).exists() or f"{shown(name)} is missing: install the pack again"
    except (OSError, ValueError) as error:
        return str(error)


def content(kind: Kind, name: str | None) -> str:
    """For IS_CHANGED: changes when the file or folder of a name does. Never raises."""
    try:
        return stat_fingerprint(find(kind, name)) if name else ""
    except (OSError, ValueError) as error:
        return str(error)


def find_embedding(name: str) -> Path | None:
    """The file of `embedding:name`, in any subfolder, with or without extension. The topmost one wins."""
    name = name.replace("\\", "/")
    files = sorted(file_names("embeddings"), key=lambda file: (len(Path(file).parts), file))
    for spelled in (str, str.casefold):  # exactly as written first, then case-insensitively as on Windows
        for ending in ("", ".safetensors", ".sft", ".pt", ".bin"):
            for file in files:
                if spelled(f"/{Path(file).as_posix()}").endswith(spelled(f"/{name}{ending}")):
                    return next(path for root in roots("embeddings") if (path := root / file).exists())
    return None


def open_loras(lora_stack: Any) -> tuple[StackEntry, ...]:
    """Opens the LoRAs of a LORA_STACK. Raises as read_stack, lora_refs and open_stack do."""
    return open_stack(lora_refs(read_stack(lora_stack)), cache_folders().hashes)


def lora_refs(stack: Iterable[Any]) -> list[LoRARef]:
    """The files of a LORA_STACK that read_stack has read. Raises FileNotFoundError naming one that is missing."""
    return [LoRARef(find("lora", entry[0]), entry[0], entry[1], entry[2], strengths_by_block(entry)) for entry in stack]


def trained_images(stack: Iterable[Any]) -> tuple[dict[str, str], list[str]]:
    """The images that the LoRAs of a stack that read_stack has read were trained on: names by SHA-256.

    The second value are the LoRAs of which that is not known, as they were not trained here.
    """
    known: dict[str, str] = {}
    unknown = []
    for name, *_ in stack:
        images = read_trained_images(run_folder(name))
        known |= images or {}
        unknown += [] if images else [name]
    return known, unknown


def run_folder(lora_name: str) -> Path:
    """The folder of the run that trained a LoRA of this name here, or kept it as one of its steps."""
    name = Path(lora_name.replace("\\", "/"))
    run = name.parent.name if re.fullmatch(r"step-\d{6,}\.safetensors", name.name) else name.stem
    return output_folder() / "lora_runs" / run


def lora_files() -> LoRAFiles:
    """Finds LoRAs by the names of combos, and those that a run kept of its earlier steps."""
    return LoRAFiles(lambda name, model, clip: LoRARef(find("lora", name), name, model, clip), _checkpoints)


def _checkpoints(lora_name: str) -> dict[int, str]:
    """By step the LoRAs of earlier steps of a LoRA: `my_lora/step-000500`, and kohya's `my_lora-step00000500`."""
    stem = re.escape(lora_name.replace("\\", "/").removesuffix(".safetensors"))
    pattern = re.compile(rf"{stem}(?:/step-|-step|-)(\d+)\.safetensors")
    matches = (pattern.fullmatch(name.replace("\\", "/")) for name in names("lora"))
    return {int(match[1]): match[0] for match in matches if match}


def base_name_taken(name: str) -> bool:
    return any((root / name).exists() for root in _typed("base"))


def lora_name_taken(file_name: str) -> bool:
    return any((root / file_name).exists() for root in roots("loras"))


def _found(kind: Kind) -> dict[str, list[Path]]:
    """For each name the folders that may contain it."""
    match kind:
        case "dataset":
            return _subfolders([input_folder()]) | _subfolders(roots("datasets"), _DATASETS)
        case "base" | "sd15_base":
            return _weights("checkpoints") | _folders_with("model_index.json", "diffusers")
        case "vae":
            return _weights("vae") | _folders_with("config.json", "vae")
        case "lora":
            return _weights("loras")
        case "control_net":
            return _weights("controlnet") | _folders_with("config.json", "controlnet")
        case "clip" | "encoder" | "classifier":
            return _folders_with("config.json", "clip_vision") | _folders_with("config.json", "clip_score")
        case "captioner":
            return _folders_with("config.json", "captioners") | _folders_with("model.onnx", "captioners")


def _typed(kind: Kind) -> list[Path]:
    match kind:
        case "dataset":
            return [input_folder()]
        case "base" | "sd15_base":
            return roots("checkpoints") + roots("diffusers")
        case "vae":
            return roots("vae")
        case "lora":
            return roots("loras")
        case "control_net":
            return roots("controlnet")
        case "clip" | "encoder" | "classifier":
            return roots("clip_score") + roots("clip_vision")
        case "captioner":
            return roots("captioners")


def _weights(folder_type: str) -> dict[str, list[Path]]:
    searched = roots(folder_type)
    return {name: searched for name in file_names(folder_type) if name.lower().endswith((".safetensors", ".sft"))}


def _subfolders(searched: list[Path], suffix: str = "") -> dict[str, list[Path]]:
    """Without empty folders: ComfyUI makes input/3d, which would be the first name and so the default."""
    return {
        path.name + suffix: searched
        for root in searched
        if root.is_dir()
        for path in root.iterdir()
        if path.is_dir() and not path.name.startswith(".") and not _is_empty(path)
    }


def _is_empty(folder: Path) -> bool:
    try:
        return not any(folder.iterdir())
    except OSError:
        return False  # not known: reading it names the reason


def _folders_with(marker: str, folder_type: str) -> dict[str, list[Path]]:
    searched = roots(folder_type)
    return {
        Path(folder).relative_to(root).as_posix(): searched
        for root in searched
        for folder, _, files in os.walk(root, followlinks=True)
        if marker in files and Path(folder) != root
    }
