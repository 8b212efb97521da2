"""What the page shows on a node: text and images."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ..sdxl_lora_core.images.png import png_info
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
        path.write_bytes(_stored_png(pixels, chunks))
    return {"filename": name, "subfolder": "sdxl_lora", "type": "temp"}


def _stored_png(pixels: np.ndarray, texts: Sequence[tuple[bytes, bytes]]) -> bytes:
    """uint8 [H, W, 3] as a PNG without compression: 3 ms for 1024 x 1024, where Pillow takes 50 at its fastest."""
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each row begins with its filter: 0, none
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), *texts, (b"IDAT", zlib.compress(rows.tobytes(), 0)), (b"IEND", b"")]
    sealed = [struct.pack(">I", len(data)) + kind + data + _crc(kind + data) for kind, data in chunks]
    return b"".join([b"\x89PNG\r\n\x1a\n", *sealed])


def _crc(data: bytes) -> bytes:
    return struct.pack(">I", zlib.crc32(data))
