"""Safe paths from user input, free names, atomic writes and content hashes."""

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
from typing import TypeVar

import numpy as np

Claimed = TypeVar("Claimed")

_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_FORBIDDEN = set('<>:"|?*\\') | {chr(code) for code in range(32)}


def safe_path(root: Path, user: str) -> Path:
    """Resolves `user`, a relative path from a widget or a request, inside `root`.

    Raises ValueError for a path outside `root` (absolute, drive, `..`, a link that points outside) and for names that
    are invalid on some operating system.
    """
    parts = user.split("/")
    for part in parts:
        if part in ("", ".", "..") or part.endswith((" ", ".")) or _RESERVED.fullmatch(part) or _FORBIDDEN & set(part):
            raise ValueError(f"{user!r} is not a valid relative path: give a file or folder inside {root.name!r}")
    resolved = root.resolve()
    path = (resolved / user).resolve()
    if not path.is_relative_to(resolved):
        raise ValueError(f"{user!r} is outside {root.name!r}: give a file or folder inside it")
    return path


def claim_name(wanted: str, claim: Callable[[str], Claimed | None]) -> Claimed:
    """The result of `claim` for the first of the names `wanted`, `wanted_00002` and so on that it accepts.

    `claim` returns None for a name that is taken.
    """
    return next(result for name in _numbered(wanted) if (result := claim(name)) is not None)


def _numbered(wanted: str) -> Iterator[str]:
    yield wanted
    for number in itertools.count(2):
        yield f"{wanted}_{number:05d}"


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary file beside `path`, then moves it to `path`, so that the file is never partial.

    Raises OSError naming the file; an existing file is then unchanged.
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
    """Returns once a file, or the entries of a folder, would survive a power failure. On Windows only for files."""
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
    """JSON with sorted keys and no spaces: one text per value. Raises ValueError for NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def json_sha256(value: object) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_sha256(path: Path, memo: Path | None = None) -> str:
    """SHA-256 of a file. `memo` is a folder that stores it while the inode, size and modification time are the same."""
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
    with contextlib.suppress(OSError):  # on a full or read-only disk the next run hashes it again
        write_text_atomic(note, digest)
    return digest


def stat_fingerprint(path: Path) -> str:
    """Changes with the name, size or modification time of the file `path` or of a file below the folder `path`.

    Reads no content and never raises.
    """
    try:
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        stats = [(file.relative_to(path).as_posix(), file.stat()) for file in files]
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        return f"unreadable: {type(error).__name__}"
    # repr, because a file name may hold bytes that are not valid Unicode
    return json_sha256([(repr(name), stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def _hash_file(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def array_sha256(array: np.ndarray) -> str:
    """SHA-256 of an array's type, shape and values."""
    described = f"{array.dtype.str}{array.shape}".encode()
    return hashlib.sha256(described + np.ascontiguousarray(array).tobytes()).hexdigest()
