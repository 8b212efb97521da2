"""ComfyUI's folders, and their counterparts below SDXL_LORA_HOME."""

from __future__ import annotations

import os
from pathlib import Path

from ...sdxl_lora_core.cache.folders import CacheFolders
from .comfy import running

CAPTIONER_FOLDERS = ("captioners", "LLM", "florence2", "blip")  # of models/; other packs use the last three
SAVED = ("loras", "checkpoints", "diffusers", "embeddings")  # folders of output/ that this pack writes to


def output_folder() -> Path:
    if not running():
        return _home()
    import folder_paths

    return Path(folder_paths.get_output_directory())


def input_folder() -> Path:
    if not running():
        return _home() / "input"
    import folder_paths

    return Path(folder_paths.get_input_directory())


def temp_folder() -> Path:
    if not running():
        return _home() / "temp"
    import folder_paths

    return Path(folder_paths.get_temp_directory())


def preview_folder() -> Path:
    """Of the images that nodes show."""
    return temp_folder() / "sdxl_lora"


def roots(folder_type: str) -> list[Path]:
    """The folders of one of ComfyUI's folder types, or of our own: clip_score, captioners, sdxl_lora_cache."""
    if not running():
        return _roots_at_home(folder_type)
    import folder_paths

    # setdefault keeps the entries of extra_model_paths.yaml, which was read before.
    types = folder_paths.folder_names_and_paths
    types.setdefault("clip_score", ([os.path.join(folder_paths.models_dir, "clip_score")], set()))
    models = [os.path.join(folder_paths.models_dir, name) for name in CAPTIONER_FOLDERS]
    types.setdefault("captioners", (models, set()))
    types.setdefault("sdxl_lora_cache", ([os.path.join(folder_paths.get_user_directory(), "sdxl_lora")], set()))
    return [Path(folder) for folder in types[folder_type][0]] if folder_type in types else []


def own_dataset_folder(folder: Path) -> Path:
    """A dataset's folder, links resolved, that is in ComfyUI's folders, so that its captions may be changed.

    Raises ValueError for any other.
    """
    resolved = folder.resolve()
    within = [root.resolve() for root in (input_folder(), *roots("datasets"))]
    if not any(resolved != root and resolved.is_relative_to(root) for root in within):
        raise ValueError(f"{folder.name!r} is not in ComfyUI's input folder: copy it there to change its captions")
    return resolved


def file_names(folder_type: str) -> list[str]:
    """Names of all files in those folders, relative to them."""
    if not running():
        return _file_names_at_home(folder_type)
    import folder_paths

    return folder_paths.get_filename_list(folder_type)  # cached by ComfyUI until a folder changes


def cache_folders() -> CacheFolders:
    """The folders of cached results."""
    return CacheFolders(roots("sdxl_lora_cache")[0])


def add_output_folders() -> None:
    """Registers the folders of output/ that this pack saves to and ComfyUI does not search by default.

    ComfyUI's own nodes then find new tokens, such as `embedding:my_lora-ohwx` in a prompt.
    """
    if not running():
        return
    import folder_paths

    for kind in ("embeddings", "diffusers"):
        folder_paths.add_model_folder_path(kind, str(output_folder() / kind))


def _home() -> Path:
    return Path(os.environ.get("SDXL_LORA_HOME", "out")).absolute()


def _roots_at_home(folder_type: str) -> list[Path]:
    home = _home()
    roots = {
        "datasets": [home / "datasets"],
        "captioners": [home / "models" / name for name in CAPTIONER_FOLDERS],
        **{kind: [home / "models" / kind, home / kind] for kind in SAVED},
        "sdxl_lora_cache": [home / "user/sdxl_lora"],
    }
    return roots.get(folder_type, [home / "models" / folder_type])


def _file_names_at_home(folder_type: str) -> list[str]:
    files = ((root, path) for root in _roots_at_home(folder_type) for path in root.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(root)) for root, path in files)
