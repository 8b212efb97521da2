"""What the page shows on a node: text and images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ..sdxl_lora_core.images.png import png_info, stored_png
from .host.folders import temp_folder

WRITERS = 4


def show(
    result: tuple[Any, ...],
    text: str,
    images: Sequence[np.ndarray] = (),
    texts: Sequence[Mapping[str, str]] | None = None,
) -> dict[str, Any]:
    """A node's return value: its outputs, and what the page shows on the node. Images are uint8 [H, W, 3].

    `texts` are each image's text chunks: who saves the preview from the page has them in the file.
    """
    ui: dict[str, Any] = {"text": (text,)}
    if images:
        with ThreadPoolExecutor(WRITERS) as writers:
            ui["images"] = list(writers.map(_preview, images, texts or [{}] * len(images)))
    return {"ui": ui, "result": result}


def _preview(pixels: np.ndarray, texts: Mapping[str, str]) -> dict[str, str]:
    """Named by its pixels, 24 digits, and by what it says of itself."""
    chunks = [(kind, data) for kind, data, *_ in png_info(texts).chunks]
    said = hashlib.sha256(b"".join(data for _, data in chunks)).hexdigest()[:8]
    name = f"{hashlib.sha256(pixels.tobytes()).hexdigest()[:24]}_{pixels.shape[1]}x{pixels.shape[0]}_{said}.png"
    path = temp_folder() / "sdxl_lora" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(stored_png(pixels, chunks))
    return {"filename": name, "subfolder": "sdxl_lora", "type": "temp"}
