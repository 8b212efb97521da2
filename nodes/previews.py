"""Text and images that the page shows on a node."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ..sdxl_lora_core.files import write_atomic
from ..sdxl_lora_core.images.c2pa_signature import Signature, own_signature
from ..sdxl_lora_core.images.png import png_info, stored_png
from .host.folders import preview_folder

WRITERS = 4


def show(
    result: tuple[Any, ...],
    text: str,
    images: Sequence[np.ndarray] = (),
    texts: Sequence[Mapping[str, str]] | None = None,
    **panel: Sequence[Any],
) -> dict[str, Any]:
    """The return value of a node: its outputs, and the text and images (uint8 [H, W, 3]) to show on it.

    `texts` are the text chunks of each image's PNG, for users who save the preview from the page. Images with texts
    were generated, and are signed if that is set up (see c2pa_signature). `panel` are lists of JSON values for the
    node's panel, which finds them as `sdxl_lora_` and their name.
    """
    ui: dict[str, Any] = {"text": (text,), **{f"sdxl_lora_{name}": values for name, values in panel.items()}}
    if images:
        with ThreadPoolExecutor(WRITERS) as writers:
            chunks = texts or [{}] * len(images)
            signature = own_signature() if texts else None
            ui["images"] = list(writers.map(lambda i: _preview(images[i], chunks[i], signature), range(len(images))))
    return {"ui": ui, "result": result}


Column = tuple[str, str, int | None]


def table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A table for the node's panel: of each column the key, the title and the decimals; the rows are JSON values."""
    return [{"columns": [list(column) for column in columns], "rows": list(rows)}]


def _preview(pixels: np.ndarray, texts: Mapping[str, str], signature: Signature | None) -> dict[str, str]:
    """Writes a preview, named by the hashes of its pixels, of its text chunks and of the certificate."""
    chunks = [(kind, data) for kind, data, *_ in png_info(texts).chunks]
    signed_by = signature.fingerprint.encode() if signature else b""
    texts_hash = hashlib.sha256(b"".join([*(data for _, data in chunks), signed_by])).hexdigest()[:8]
    name = f"{hashlib.sha256(pixels.tobytes()).hexdigest()[:24]}_{pixels.shape[1]}x{pixels.shape[0]}_{texts_hash}.png"
    path = preview_folder() / name
    try:
        os.utime(path)  # the service removes those that were not shown for long
    except FileNotFoundError:
        png = stored_png(pixels, chunks)
        data = signature.sign(png) if signature else png
        write_atomic(path, lambda file: file.write_bytes(data))
    return {"filename": name, "subfolder": path.parent.name, "type": "temp"}
