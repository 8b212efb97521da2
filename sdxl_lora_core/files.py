"""Paths that came from a widget, writes that survive a crash, and content hashes."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_FORBIDDEN = set('<>:"|?*\\') | {chr(code) for code in range(32)}


def safe_path(root: Path, user: str) -> Path:
    """`user`, a relative path from a widget or a request, as a real path inside `root`.

    Raises ValueError for anything that leaves `root` (absolute, drive, `..`, a link that points outside) and for names
    that some operating system cannot hold.
    """
    parts = user.split("/")
    for part in parts:
        if part in ("", ".", "..") or part.endswith((" ", ".")) or _RESERVED.fullmatch(part) or _FORBIDDEN & set(part):
            raise ValueError(f"{user!r} is not a usable relative path: name a file or folder inside {root.name!r}")
    resolved = root.resolve()
    path = (resolved / user).resolve()
    if not path.is_relative_to(resolved):
        raise ValueError(f"{user!r} leads outside of {root.name!r}: name a file or folder inside it")
    return path


def next_names(wanted: str) -> Iterator[str]:
    """`wanted`, then `wanted_00002` and so on, without end."""
    yield wanted
    for number in itertools.count(2):
        yield f"{wanted}_{number:05d}"


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary file beside `path`, then moves that to `path`: whole or not at all.

    Raises OSError with the path and the free space if the disk is full; the old file then still stands.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        write(temporary)
        flush_to_disk(temporary)
        os.replace(temporary, path)
        flush_to_disk(path.parent)
    except OSError as error:
        raise OSError(error.errno, f"could not write {path.name}: {error.strerror or error}", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Returns once a file's bytes, or the names in a folder, would survive a power cut. Windows knows only files."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text_atomic(path: Path, text: str) -> None:
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def canonical_json(value: object) -> str:
    """One text for one value: sorted keys, no spaces, NaN refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def json_sha256(value: object) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_sha256(path: Path, memo: Path | None = None) -> str:
    """SHA-256 of the file's bytes. `memo` is a folder that remembers it while inode, size and mtime stay the same."""
    if memo is None:
        return _hash_file(path)
    stat = path.stat()
    identity = [str(path.resolve()), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns]
    note = memo / f"{json_sha256(identity)}.txt"
    with contextlib.suppress(OSError, ValueError):
        known = note.read_text(encoding="ascii")
        if re.fullmatch("[0-9a-f]{64}", known):  # a crash may have left it empty
            return known
    digest = _hash_file(path)
    with contextlib.suppress(OSError):  # a full or read-only disk only costs the next run a second hashing
        write_text_atomic(note, digest)
    return digest


def _hash_file(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def array_sha256(array: np.ndarray) -> str:
    """Of type, shape and values."""
    described = f"{array.dtype.str}{array.shape}".encode()
    return hashlib.sha256(described + np.ascontiguousarray(array).tobytes()).hexdigest()
