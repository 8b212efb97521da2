"""Metadata of LoRA files by this pack and by kohya's trainers: tag counts and trigger words."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import accumulate

from .config import FileFormat

IMPLEMENTATIONS: dict[FileFormat, str] = {
    "kohya": "https://github.com/Stability-AI/generative-models",  # ModelSpec's name for SAI's block names
    "peft": "diffusers",
    "comfyui": "https://github.com/comfyanonymous/ComfyUI",
}


TAG_BYTES = 2**20  # safetensors files have a header of at most 100 MB, and every loader reads all of it


def tag_counts(captions: Iterable[str]) -> dict[str, int]:
    """How often each comma-separated part of the captions occurs, as `ss_tag_frequency` counts.

    If there are more than TAG_BYTES of them, only the most frequent are counted.
    """
    tags = (tag.strip() for caption in captions for tag in caption.split(","))
    counts = Counter(tag for tag in tags if tag)
    if sum(len(tag.encode()) for tag in counts) <= TAG_BYTES:
        return dict(counts)
    ordered = sorted(counts, key=lambda tag: (-counts[tag], tag))
    sizes = accumulate(len(tag.encode()) for tag in ordered)
    return {tag: counts[tag] for tag, size in zip(ordered, sizes, strict=True) if size <= TAG_BYTES}


def read_tag_counts(metadata: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """`ss_tag_frequency` by folder. Other programs write it too, so malformed values are ignored."""
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"), parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return {}
    known = folders.items() if isinstance(folders, dict) else ()
    return {folder: _counts(tags) for folder, tags in known if isinstance(tags, dict)}


def _counts(tags: Mapping[str, object]) -> dict[str, int]:
    """The counts that are whole numbers, as numbers or as text."""
    whole = {tag: str(count) for tag, count in tags.items() if not isinstance(count, bool)}
    return {tag: int(count) for tag, count in whole.items() if re.fullmatch(r"\d{1,9}", count)}


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The trigger words in a file's metadata."""
    return tuple(word.strip() for word in metadata.get("modelspec.trigger_phrase", "").split(",") if word.strip())
