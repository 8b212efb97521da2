"""The disk cache of generated images: verified when read, safe between processes, never a reason for a failure."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from . import maintenance
from .image_entries import (
    DAMAGE,
    entry_folder,
    lock_of,
    mark_used,
    read_entry,
    read_latents,
    read_manifest,
    release,
    write_entry,
)

log = logging.getLogger("sdxl_lora")

LOCK_SECONDS = 600.0
POLL_SECONDS = 0.2
CANNOT_WRITE = "the image cache cannot be written, so images are not cached: %s"
CANNOT_COUNT = "the size of the image cache cannot be updated, so it may exceed its limit: %s"


class ImageCache:
    """A folder with an entry for each key (see image_entries), which evicts the least recently used at its size limit.

    A damaged entry counts as missing and is replaced by the next `store`. If the disk is full or read-only, images are
    generated but not cached. Each ImageCache logs either warning once.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._warned: set[str] = set()

    def load(self, key: str) -> np.ndarray | None:
        """The pixels stored under `key` (uint8 [H, W, 3]), or None."""
        folder = entry_folder(self.root, key)
        try:
            pixels = read_entry(folder)
        except FileNotFoundError:
            return None
        except DAMAGE as error:
            self._warn_once("read", "a cached image is damaged and will be generated again (%s): %s", key[:12], error)
            return None
        mark_used(folder)
        return pixels

    def manifest(self, key: str) -> dict[str, Any]:
        """What was stored beside the image under `key`; empty if it cannot be read."""
        try:
            return read_manifest(entry_folder(self.root, key))
        except DAMAGE:
            return {}

    def load_latents(self, key: str) -> Tensor | None:
        """The latents stored with the image under `key`, [4, H/8, W/8], or None."""
        try:
            return read_latents(entry_folder(self.root, key))
        except FileNotFoundError:
            return None
        except DAMAGE as error:
            self._warn_once("read", "cached latents are damaged and will be computed again (%s): %s", key[:12], error)
            return None

    def store(
        self,
        key: str,
        pixels: np.ndarray,
        manifest: Mapping[str, Any],
        texts: Mapping[str, str] | None = None,
        latents: Tensor | None = None,
    ) -> np.ndarray:
        """Stores `pixels` (uint8 [H, W, 3]) under `key` and returns them as a later `load` will.

        `texts` become text chunks of the PNG; `latents` are stored beside it.
        """
        try:
            written = write_entry(entry_folder(self.root, key), pixels, manifest, texts or {}, latents)
        except OSError as error:
            self._warn_once("write", CANNOT_WRITE, error)
            return pixels
        try:
            maintenance.count_in(self.root, written)
        except (OSError, NotImplementedError) as error:
            self._warn_once("count", CANNOT_COUNT, error)
        return pixels

    @contextmanager
    def locked(self, keys: Iterable[str], waiting: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Prevents other processes and threads from generating the same images within the block.

        `waiting` is called several times a second while another process has a lock; it may raise to give up. After
        LOCK_SECONDS, or where locks cannot be created, the block runs without: an image may be generated twice, but
        files stay intact.
        """
        with ExitStack() as held:
            for key in sorted(set(keys)):  # in one order, or two processes could wait for each other
                self._lock(held, key, waiting)
            yield

    def _lock(self, held: ExitStack, key: str, waiting: Callable[[], object]) -> None:
        from filelock import Timeout

        lock = lock_of(entry_folder(self.root, key))
        deadline = time.monotonic() + LOCK_SECONDS
        while time.monotonic() < deadline:
            try:
                Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
                lock.acquire(timeout=POLL_SECONDS, poll_interval=POLL_SECONDS / 4)
            except Timeout:  # a subclass of OSError, so it must come first
                waiting()
            except (OSError, NotImplementedError) as error:
                return self._warn_once("write", CANNOT_WRITE, error)
            else:
                held.callback(release, lock)
                return None
        return self._warn_once(
            "lock", "waited %.0f s for a lock of another process, and continues without it", LOCK_SECONDS
        )

    def _warn_once(self, kind: str, message: str, *details: object) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning(message, *details)
