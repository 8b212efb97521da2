"""Generated images on disk: each is made once, checked whenever it is read, and never the reason a generation fails."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .files import canonical_json, json_sha256, write_atomic, write_text_atomic

if TYPE_CHECKING:
    from filelock import BaseFileLock

log = logging.getLogger("sdxl_lora")

SCHEMA = 1
IMAGE, MANIFEST = "image.png", "manifest.json"
COMPRESS_LEVEL = 1
LOCK_SECONDS = 600.0
POLL_SECONDS = 0.2
CANNOT_WRITE = "the image cache cannot be written, so images are not kept: %s"


def key_of(settings: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the settings as canonical JSON."""
    return json_sha256({"schema": SCHEMA, **settings})


class ImageCache:
    """A folder with one 8-bit PNG and one manifest for each key, `v1/<ab>/<key>/`. The manifest is the commit mark.

    A damaged entry counts as missing and is replaced by the next `store`. A disk that is full or read-only costs the
    cache, not the image. Either is said once for each ImageCache.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._warned: set[str] = set()

    def load(self, key: str) -> np.ndarray | None:
        """The pixels stored under `key` (uint8 [H, W, 3]), or None."""
        try:
            return _read_entry(self._folder(key))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._warn_once("read", "a cached image is damaged and will be made again (%s): %s", key[:12], error)
            return None

    def store(self, key: str, pixels: np.ndarray, manifest: Mapping[str, Any]) -> np.ndarray:
        """Keeps `pixels` (uint8 [H, W, 3]) under `key` and returns what a later `load` will return."""
        png = _encode_png(pixels)
        record = {**manifest, "schema": SCHEMA, "key": key, **_checksum(png)}
        try:
            self._write(self._folder(key), png, canonical_json(record))
        except OSError as error:
            self._warn_once("write", CANNOT_WRITE, error)
        return pixels

    @contextmanager
    def locked(self, keys: Iterable[str], waiting: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Keeps other processes and threads from making the same images meanwhile.

        `waiting` is called several times a second while another one holds a lock; it may raise to give up. After
        LOCK_SECONDS, or where locks cannot be made, the block runs without: work may be done twice, no file is torn.
        """
        with ExitStack() as held:
            for key in sorted(set(keys)):  # one order for all, or two processes could wait for each other
                self._lock(held, key, waiting)
            yield

    def _folder(self, key: str) -> Path:
        return self.root / f"v{SCHEMA}" / key[:2] / key

    def _write(self, folder: Path, png: bytes, manifest: str) -> None:
        for left_by_a_kill in folder.glob(".*.tmp"):
            left_by_a_kill.unlink(missing_ok=True)
        write_atomic(folder / IMAGE, lambda temporary: temporary.write_bytes(png))
        write_text_atomic(folder / MANIFEST, manifest)

    def _lock(self, held: ExitStack, key: str, waiting: Callable[[], object]) -> None:
        from filelock import FileLock, Timeout

        lock = FileLock(self._folder(key).with_suffix(".lock"))
        deadline = time.monotonic() + LOCK_SECONDS
        while time.monotonic() < deadline:
            try:
                Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
                lock.acquire(timeout=POLL_SECONDS, poll_interval=POLL_SECONDS / 4)
            except Timeout:  # an OSError as well: it has to stand first
                waiting()
            except (OSError, NotImplementedError) as error:
                return self._warn_once("write", CANNOT_WRITE, error)
            else:
                held.callback(_release, lock)
                return None
        return self._warn_once("lock", "waited %.0f s for another process and go on without it", LOCK_SECONDS)

    def _warn_once(self, kind: str, message: str, *details: object) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning(message, *details)


def _release(lock: BaseFileLock) -> None:
    # Removed while still held: who waits opens the name anew at each try. Windows refuses, and removes it on release.
    with suppress(OSError):
        Path(lock.lock_file).unlink()
    lock.release()


def _encode_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=COMPRESS_LEVEL)
    return buffer.getvalue()


def _checksum(png: bytes) -> dict[str, Any]:
    return {"size": len(png), "sha256": hashlib.sha256(png).hexdigest()}


def _read_entry(folder: Path) -> np.ndarray:
    manifest = json.loads((folder / MANIFEST).read_bytes())
    png = (folder / IMAGE).read_bytes()
    found = _checksum(png)
    wanted = {name: manifest[name] for name in found}
    if found != wanted or manifest["key"] != folder.name:
        raise ValueError("the image is not the one in its manifest")
    return np.array(Image.open(io.BytesIO(png)))
