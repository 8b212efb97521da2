"""The images that a run was trained on, by the hash of their content, in the run's folder."""

from __future__ import annotations

import json
from pathlib import Path

from ..files import write_text_atomic
from .caption_dataset import CaptionDataset

_FILE = "images.json"


def write_trained_images(run_folder: Path, dataset: CaptionDataset) -> None:
    """Writes the name of every training image by the SHA-256 of its file. Images held out are not among them."""
    names = {entry.sha256: entry.image.name for entry in dataset.entries}
    write_text_atomic(run_folder / _FILE, json.dumps(names, ensure_ascii=False, indent=0))


def read_trained_images(run_folder: Path) -> dict[str, str] | None:
    """Names by SHA-256; None if the run's folder has none, as of a run before 0.4."""
    try:
        names = json.loads((run_folder / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return {str(content): str(name) for content, name in names.items()} if isinstance(names, dict) else None
