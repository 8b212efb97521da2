"""Statistics, size limit, eviction and verification of the image cache."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..files import write_text_atomic
from .image_entries import DAMAGE, Entry, entries, held, read_entry, read_latents, remove_entry, shelves

LIMIT, SIZE = "limit_gb.txt", "size.txt"
GB = 10**9
KEPT_SHARE = 0.9  # of the limit after eviction: evicting less would scan the whole cache for every further image
_PATIENCE = 10.0  # seconds to wait while another process evicts images
CACHE_LIMIT_GB = 10.0  # the limit where the cache's folder has no limit_gb.txt


@dataclass(frozen=True)
class Stats:
    """`size` and `limit` in bytes; `oldest` and `newest` are times of last use in seconds since 1970."""

    images: int
    size: int
    limit: int
    oldest: float | None
    newest: float | None

    def __str__(self) -> str:
        room = f"{_count(self.images)}, {self.size / GB:.2f} GB of {self.limit / GB:g} GB"
        if self.oldest is None or self.newest is None:
            return room
        days = [time.strftime("%Y-%m-%d %H:%M", time.localtime(used)) for used in (self.oldest, self.newest)]
        return f"{room}\nlast used between {days[0]} and {days[1]}"


@dataclass(frozen=True)
class Freed:
    """The number of images deleted and their `size`; `left` is the size of the cache now, both in bytes."""

    images: int
    size: int
    left: int

    def __str__(self) -> str:
        return f"{_count(self.images)} removed, {self.size / GB:.2f} GB"


def damage(keys: Sequence[str]) -> str:
    """The number of damaged images as text."""
    return _count(len(keys), "damaged image")


def _count(number: int, kind: str = "image") -> str:
    return f"{number:,} {kind}{'s' * (number != 1)}"


def stats(root: Path) -> Stats:
    found = list(entries(root))
    uses = [entry.used for entry in found if entry.used]
    size = sum(entry.size for entry in found)
    return Stats(len(uses), size, limit(root), min(uses, default=None), max(uses, default=None))


def limit(root: Path) -> int:
    """The size limit in bytes: that of the file beside the images, or the default."""
    try:
        return int(float((root / LIMIT).read_text(encoding="ascii")) * GB)
    except (OSError, ValueError, OverflowError):
        return int(CACHE_LIMIT_GB * GB)


def set_limit(root: Path, gigabytes: float) -> None:
    """Sets the size limit for every process that uses the cache. Raises ValueError unless it is positive and finite."""
    if not 0 < gigabytes < math.inf:
        raise ValueError(f"limit_gb is {gigabytes:g}: set it to a size above 0")
    write_text_atomic(root / LIMIT, f"{gigabytes:g}")


def count_in(root: Path, added: int) -> None:
    """Adds to the running total, and evicts the least recently used images when it exceeds the limit. Raises OSError.

    The folder is scanned only then. Until then the total may be too high: an image written again counts twice.
    """
    with held(root / SIZE, _PATIENCE) as mine:
        if mine:  # else another process is evicting images, and counts them all anyway
            known = _read_size(root)
            total = sum(entry.size for entry in entries(root)) if known is None else known + added
            allowed = limit(root)
            _write_size(root, _evict(root, int(allowed * KEPT_SHARE)).left if total > allowed else total)


def prune(root: Path) -> Freed:
    """Deletes what killed processes left behind, then the least recently used images until the rest fits the limit."""
    for lock in [lock for shelf in shelves(root) for lock in shelf.glob("*.lock")]:
        with held(lock):  # releasing it deletes the file
            pass
    return _freed(root, limit(root))


def clear(root: Path) -> Freed:
    """Deletes every image, except those that another process is writing."""
    return _freed(root, 0)


def verify(
    root: Path, remove: bool = False, on_image: Callable[[int, int], object] = lambda done, total: None
) -> list[str]:
    """The keys of damaged images, which would be generated again. `on_image(done, total)` may raise to cancel."""
    found = [entry for entry in entries(root) if entry.used]
    damaged = []
    for number, entry in enumerate(found, 1):
        try:
            read_entry(entry.folder)
            read_latents(entry.folder)
        except FileNotFoundError:  # evicted meanwhile
            pass
        except DAMAGE:
            damaged.append(entry)
        on_image(number, len(found))
    if remove:
        _remove(damaged)
    return [entry.folder.name for entry in damaged]


def _freed(root: Path, allowed: int) -> Freed:
    if not root.is_dir():
        return Freed(0, 0, 0)
    with held(root / SIZE, _PATIENCE):
        freed = _evict(root, allowed)
        _write_size(root, freed.left)
        return freed


def _evict(root: Path, allowed: int) -> Freed:
    """Deletes the least recently used images until the others take at most `allowed` bytes."""
    oldest_first = sorted(entries(root), key=lambda entry: entry.used)
    left = total = sum(entry.size for entry in oldest_first)
    going = []
    for entry in oldest_first:
        if left <= allowed and entry.used:  # incomplete entries are deleted in any case
            break
        going.append(entry)
        left -= entry.size
    removed = _remove(going)
    left = sum(entry.size for entry in entries(root))
    return Freed(sum(1 for entry in removed if entry.used), max(0, total - left), left)


def _remove(going: Iterable[Entry]) -> list[Entry]:
    """Deletes entries and returns those that are gone: others are locked, or a program has one of their files open."""
    removed = []
    for entry in going:
        with held(entry.folder) as mine:
            if mine:
                with suppress(OSError):
                    remove_entry(entry.folder)
                if not entry.folder.exists():
                    removed.append(entry)
    return removed


def _read_size(root: Path) -> int | None:
    try:
        return int((root / SIZE).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _write_size(root: Path, size: int) -> None:
    (root / SIZE).write_text(str(size), encoding="ascii")  # if it is damaged, the images are counted again
