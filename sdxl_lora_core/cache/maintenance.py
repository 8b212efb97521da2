"""The image cache as a whole: how large it is and may be, what is dropped first, and whether all of it is sound."""

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
KEPT_SHARE = 0.9  # of the limit when it is passed, or every further image would look through the whole cache
_PATIENCE = 10.0  # seconds, while another process makes room
CACHE_LIMIT_GB = 10.0  # of the image cache, where its own folder says nothing else


@dataclass(frozen=True)
class Stats:
    """`size` and `limit` are bytes, `oldest` and `newest` times of last use (seconds since 1970)."""

    images: int
    size: int
    limit: int
    oldest: float | None
    newest: float | None

    def __str__(self) -> str:
        """For a person."""
        room = f"{_count(self.images)}, {self.size / GB:.2f} GB of {self.limit / GB:g} GB"
        if self.oldest is None or self.newest is None:
            return room
        days = [time.strftime("%Y-%m-%d %H:%M", time.localtime(used)) for used in (self.oldest, self.newest)]
        return f"{room}\nlast used between {days[0]} and {days[1]}"


@dataclass(frozen=True)
class Freed:
    """`left` is what the cache takes now. Both are bytes."""

    images: int
    size: int
    left: int

    def __str__(self) -> str:
        return f"{_count(self.images)} removed, {self.size / GB:.2f} GB"


def damage(keys: Sequence[str]) -> str:
    """For a person."""
    return _count(len(keys), "damaged image")


def _count(number: int, kind: str = "image") -> str:
    return f"{number:,} {kind}{'s' * (number != 1)}"


def stats(root: Path) -> Stats:
    found = list(entries(root))
    uses = [entry.used for entry in found if entry.used]
    size = sum(entry.size for entry in found)
    return Stats(len(uses), size, limit(root), min(uses, default=None), max(uses, default=None))


def limit(root: Path) -> int:
    """The bytes that the cache may take: as the file beside the images says, or the default."""
    try:
        return int(float((root / LIMIT).read_text(encoding="ascii")) * GB)
    except (OSError, ValueError, OverflowError):
        return int(CACHE_LIMIT_GB * GB)


def set_limit(root: Path, gigabytes: float) -> None:
    """For everybody who uses the cache, from the next image on. Raises ValueError for what is no size."""
    if not 0 < gigabytes < math.inf:
        raise ValueError(f"limit_gb is {gigabytes:g}: give a size above 0")
    write_text_atomic(root / LIMIT, f"{gigabytes:g}")


def count_in(root: Path, added: int) -> None:
    """Keeps the running total, and drops what was not used for longest when it passes the limit. Raises OSError.

    The cache is looked through only then. Until then the total may err upwards: an image made anew counts twice.
    """
    with held(root / SIZE, _PATIENCE) as mine:
        if mine:  # else another one makes room for longer than that, and counts anew anyway
            known = _read_size(root)
            total = sum(entry.size for entry in entries(root)) if known is None else known + added
            allowed = limit(root)
            _write_size(root, _drop(root, int(allowed * KEPT_SHARE)).left if total > allowed else total)


def prune(root: Path) -> Freed:
    """Removes what killed processes left, then what was not used for longest until the rest fits the limit."""
    for lock in [lock for shelf in shelves(root) for lock in shelf.glob("*.lock")]:
        with held(lock):  # letting go of it removes the file
            pass
    return _dropped(root, limit(root))


def clear(root: Path) -> Freed:
    """Removes every image, except those that somebody is making."""
    return _dropped(root, 0)


def verify(
    root: Path, remove: bool = False, on_image: Callable[[int, int], object] = lambda done, total: None
) -> list[str]:
    """The keys of damaged images; the cache would make them anew. `on_image(done, total)` may raise to cancel."""
    found = [entry for entry in entries(root) if entry.used]
    damaged = []
    for number, entry in enumerate(found, 1):
        try:
            read_entry(entry.folder)
            read_latents(entry.folder)
        except FileNotFoundError:  # dropped meanwhile
            pass
        except DAMAGE:
            damaged.append(entry)
        on_image(number, len(found))
    if remove:
        _remove(damaged)
    return [entry.folder.name for entry in damaged]


def _dropped(root: Path, allowed: int) -> Freed:
    if not root.is_dir():
        return Freed(0, 0, 0)
    with held(root / SIZE, _PATIENCE):
        freed = _drop(root, allowed)
        _write_size(root, freed.left)
        return freed


def _drop(root: Path, allowed: int) -> Freed:
    """Removes images, the one not used for longest first, until the others take no more than `allowed` bytes."""
    oldest_first = sorted(entries(root), key=lambda entry: entry.used)
    left = total = sum(entry.size for entry in oldest_first)
    going = []
    for entry in oldest_first:
        if left <= allowed and entry.used:  # what has no manifest goes in any case
            break
        going.append(entry)
        left -= entry.size
    removed = _remove(going)
    size = sum(entry.size for entry in removed)
    return Freed(sum(1 for entry in removed if entry.used), size, total - size)


def _remove(going: Iterable[Entry]) -> list[Entry]:
    """Those that are gone now. What another process holds stays."""
    removed = []
    for entry in going:
        with held(entry.folder) as mine:
            if mine:
                with suppress(OSError):  # another process was faster, or writes into it again
                    remove_entry(entry.folder)
                removed.append(entry)
    return removed


def _read_size(root: Path) -> int | None:
    try:
        return int((root / SIZE).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _write_size(root: Path, size: int) -> None:
    (root / SIZE).write_text(str(size), encoding="ascii")  # a torn one is counted anew
