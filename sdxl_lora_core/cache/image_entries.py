"""A cached image on disk: a folder with an 8-bit PNG and a manifest, and with the latents if they were requested.

The manifest is written last: an entry without one is incomplete.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor

from ..files import canonical_json, write_atomic, write_text_atomic
from ..images.png import png_info

if TYPE_CHECKING:
    from filelock import BaseFileLock

SCHEMA = 1
IMAGE, LATENTS, MANIFEST = "image.png", "latents.safetensors", "manifest.json"
# Pillow's fastest setting for writing and reading images: run-length encoding only.
COMPRESSION = {"compress_level": 1, "compress_type": 3}  # 3: zlib's Z_RLE
DAMAGE = (OSError, ValueError, KeyError, TypeError)
_SHELF, _KEY = re.compile("[0-9a-f]{2}"), re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """An entry's folder, its size in bytes, and its last use in seconds since 1970 (0 without a manifest)."""

    folder: Path
    size: int
    used: float


def entry_folder(root: Path, key: str) -> Path:
    return root / f"v{SCHEMA}" / key[:2] / key


def write_entry(
    folder: Path,
    pixels: np.ndarray,
    manifest: Mapping[str, Any],
    texts: Mapping[str, str],
    latents: Tensor | None = None,
) -> int:
    """Writes uint8 [H, W, 3] with `texts` in the PNG. Returns the number of bytes written. May raise OSError."""
    for left_by_a_kill in folder.glob(".*.tmp"):
        left_by_a_kill.unlink(missing_ok=True)
    files = {IMAGE: _encode_png(pixels, texts)}
    record = {**manifest, "schema": SCHEMA, "key": folder.name, **_checksum(files[IMAGE])}
    if latents is not None:
        files[LATENTS] = save({"latents": latents.contiguous()})
        record["latents"] = _checksum(files[LATENTS])
    for name, content in files.items():
        write_atomic(folder / name, lambda temporary, content=content: temporary.write_bytes(content))
    written = canonical_json(record)
    write_text_atomic(folder / MANIFEST, written)
    return sum(map(len, files.values())) + len(written)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises FileNotFoundError, or one of DAMAGE."""
    return json.loads((folder / MANIFEST).read_bytes())


def read_entry(folder: Path) -> np.ndarray:
    """The pixels, uint8 [H, W, 3]. Raises FileNotFoundError if there is no entry, one of DAMAGE if it is damaged."""
    manifest = read_manifest(folder)
    png = (folder / IMAGE).read_bytes()
    found = _checksum(png)
    wanted = {name: manifest[name] for name in found}
    if found != wanted or manifest["key"] != folder.name:
        raise ValueError("the image does not match its manifest")
    return np.array(Image.open(io.BytesIO(png)))


def read_latents(folder: Path) -> Tensor | None:
    """The latents stored with the image, or None. Raises as read_entry does."""
    wanted = read_manifest(folder).get("latents")
    if wanted is None:
        return None
    content = (folder / LATENTS).read_bytes()
    if _checksum(content) != wanted:
        raise ValueError("the latents do not match their manifest")
    return load(content)["latents"]


def mark_used(folder: Path) -> None:
    with suppress(OSError):  # a read-only disk keeps the older time
        os.utime(folder / MANIFEST)


def entries(root: Path) -> Iterator[Entry]:
    """All entries, in no particular order. Links and files with other names are ignored."""
    for folder in (folder for shelf in shelves(root) for folder in _subfolders(shelf, _KEY)):
        with suppress(FileNotFoundError):  # another process removed it meanwhile
            files = {file.name: file.stat(follow_symlinks=False) for file in os.scandir(folder)}
            used = files[MANIFEST].st_mtime if MANIFEST in files else 0.0
            yield Entry(folder, sum(file.st_size for file in files.values()), used)


def remove_entry(folder: Path) -> None:
    """Deletes the manifest first, so that an interruption leaves no valid entry. May raise OSError.

    Foreign files and folders in the entry, such as a file server's thumbnails, are deleted as well.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def lock_of(folder: Path) -> BaseFileLock:
    """The lock to hold while writing or deleting an entry."""
    from filelock import FileLock

    return FileLock(folder.with_suffix(".lock"))


def release(lock: BaseFileLock) -> None:
    # Deleted while still held: waiting processes reopen the file at each try. Windows deletes it on release instead.
    with suppress(OSError):
        Path(lock.lock_file).unlink()
    lock.release()


@contextmanager
def held(folder: Path, seconds: float = 0.0) -> Iterator[bool]:
    """Locks an entry for the block. Yields False, without the lock, if another process holds it for `seconds`."""
    from filelock import Timeout

    lock = lock_of(folder)
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        release(lock)


def shelves(root: Path) -> list[Path]:
    """The folders that contain the entries, named by the first two digits of the key."""
    return _subfolders(root / f"v{SCHEMA}", _SHELF)


def _subfolders(folder: Path, name: re.Pattern[str]) -> list[Path]:
    try:
        found = list(os.scandir(folder))
    except FileNotFoundError:
        return []
    return [Path(item.path) for item in found if name.fullmatch(item.name) and item.is_dir(follow_symlinks=False)]


def _encode_png(pixels: np.ndarray, texts: Mapping[str, str]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **COMPRESSION, pnginfo=png_info(texts))
    return buffer.getvalue()


def _checksum(content: bytes) -> dict[str, Any]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
