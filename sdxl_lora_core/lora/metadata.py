"""Metadata of LoRA files by this pack and by kohya's trainers: tag counts and trigger words."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping

from .config import FileFormat

IMPLEMENTATIONS: dict[FileFormat, str] = {
    "kohya": "https://github.com/Stability-AI/generative-models",  # ModelSpec's name for SAI's block names
    "peft": "diffusers",
    "comfyui": "https://github.com/comfyanonymous/ComfyUI",
}


def tag_counts(captions: Iterable[str]) -> dict[str, int]:
    """How often each comma-separated part of the captions occurs, as `ss_tag_frequency` counts."""
    tags = (tag.strip() for caption in captions for tag in caption.split(","))
    return dict(Counter(tag for tag in tags if tag))


def read_tag_counts(metadata: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """`ss_tag_frequency` by folder. Other programs write it too, so malformed values are ignored."""
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
    except ValueError:
        return {}
    known = folders.items() if isinstance(folders, dict) else ()
    return {folder: counts for folder, counts in known if isinstance(counts, dict)}


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The trigger words in a file's metadata."""
    return tuple(word.strip() for word in metadata.get("modelspec.trigger_phrase", "").split(",") if word.strip())
