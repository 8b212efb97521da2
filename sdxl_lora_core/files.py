"""Safe paths from user input, free names, atomic writes and content hashes."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from .messages import shown

Claimed = TypeVar("Claimed")

LONGEST_NAME = 255  # bytes of a file name on most systems; some shares have less
_LONGEST_PATH = 4096 if os.name == "posix" else 32_767  # Windows has 260, or this many where long paths are on
_TEMPORARY = 64  # bytes, of temporary names beside a file
_NUMBERED = "_00002"
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_FORBIDDEN = set('<>:"|?*\\') | {chr(code) for code in (*range(32), 127)}


def safe_path(root: Path, user: str) -> Path:
    """Resolves `user`, a relative path from a widget or a request, inside `root`.

    Raises ValueError for a path outside `root` (absolute, drive, `..`, a link that points outside) and for names that
    are invalid on some operating system.
    """
    parts = user.split("/")
    for part in parts:
        if part in ("", ".", "..") or part.endswith((" ", ".")) or _RESERVED.fullmatch(part) or _FORBIDDEN & set(part):
            raise ValueError(f"{shown(user)} is not a valid relative path: give a file or folder inside {root.name!r}")
    resolved = root.resolve()
    path = (resolved / user).resolve()
    if not path.is_relative_to(resolved):
        raise ValueError(f"{shown(user)} is outside {root.name!r}: give a file or folder inside it")
    return path


def check_name(option: str, name: str, ending: str = ".safetensors", subfolders: bool = False) -> None:
    """Raises ValueError naming `option` unless `name` with `ending` is a valid file name on every operating system.

    There must be room for the number that is appended to a taken name. `subfolders`: slashes separate folders.
    """
    parts = name.split("/") if subfolders else [name]
    if reason := next((reason for part in parts if (reason := _name_problem(part))), None):
        raise ValueError(f"{option} is {shown(name)}: {reason}")
    if ending and name.lower().endswith(ending):
        raise ValueError(f"{option} is {shown(name)}: leave out {ending}, which is added")
    require_short(option, name, LONGEST_NAME - len(_NUMBERED + ending))


def require_short(option: str, name: str, most: int) -> None:
    """Raises ValueError naming `option` if the last part of `name` has more than `most` bytes."""
    size = len(name.rpartition("/")[2].encode())
    if size > most:
        raise ValueError(f"{option} is {shown(name)}, whose name takes {size} bytes as UTF-8: use at most {most}")


def longest_name(folder: Path) -> int:
    """The bytes that a file name in `folder`, or in its nearest parent that exists, may have."""
    return _limit(folder, "PC_NAME_MAX", LONGEST_NAME)


def longest_path(folder: Path) -> int:
    """The bytes that a path in `folder` may have, as longest_name."""
    return _limit(folder, "PC_PATH_MAX", _LONGEST_PATH) - 1  # without the zero at its end


def _limit(folder: Path, name: str, otherwise: int) -> int:
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    try:
        return os.pathconf(existing, name)
    except (AttributeError, OSError, ValueError):  # Windows has no pathconf
        return otherwise


def require_file_names(folder: Path, names: Mapping[str, str], ending: str = ".safetensors") -> None:
    """Raises ValueError if a file of one of `names` (by option), with a number and `ending`, cannot be in `folder`."""
    longest = longest_name(folder)
    for option, name in names.items():
        for subfolder in name.split("/")[:-1]:
            require_short(option, subfolder, longest)
        require_short(option, name, longest - len(_NUMBERED + ending))
        size = len(os.fsencode(folder.resolve() / name)) + _TEMPORARY
        if size > longest_path(folder):
            raise ValueError(f"{option} is {shown(name)}, whose path takes {size} bytes: use fewer or shorter folders")


def _name_problem(part: str) -> str | None:
    """Why a part of a path is not a valid name."""
    if not part or part.strip(" .") != part:
        return "use a name that neither is empty nor begins or ends with a dot or a space"
    if bad := sorted(_FORBIDDEN & set(part) | {"/"} & set(part)):
        return f"leave out {', '.join(map(repr, bad))}, which file names cannot have everywhere"
    if any("\ud800" <= letter <= "\udfff" for letter in part):
        return "it contains half a character (a lone surrogate): type it again"
    if _RESERVED.fullmatch(part):
        return "Windows reserves this name: use another"
    return None


def temporary_beside(path: Path) -> Path:
    """A new name in the folder of `path`: short, as names may be limited to 143 bytes, and known to `leftovers_of`."""
    return path.with_name(f".{_mark(path)}.{uuid.uuid4().hex}.tmp")


def leftovers_of(path: Path) -> Iterator[Path]:
    """The temporary files for `path` of killed processes."""
    return path.parent.glob(f".{_mark(path)}.{'[0-9a-f]' * 32}.tmp")


def _mark(path: Path) -> str:
    return hashlib.sha256(path.name.encode("utf-8", "surrogateescape")).hexdigest()[:8]


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
    temporary = temporary_beside(path)
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
    """SHA-256 of a file. `memo` is a folder that stores it while the inode, size and times are the same.

    A file that changed so recently that the next change may get the same times is hashed without a memo.
    """
    if memo is None:
        return _hash_file(path)
    stat = path.stat()
    # ctime, because programs can set the modification time back; on Windows it is the time of creation.
    identity = [str(path.resolve()), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) < _clock_grain(stat):
        return _hash_file(path)
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
    """Changes with the name, size or times of the file `path` or of a file below the folder `path`.

    Reads no content and never raises.
    """
    try:
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        stats = [(file.relative_to(path).as_posix(), file.stat()) for file in files]
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        return f"unreadable: {type(error).__name__}"
    # repr, because a file name may hold bytes that are not valid Unicode
    return json_sha256([(repr(name), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats])


def _clock_grain(stat: os.stat_result) -> int:
    """An upper bound of the resolution of a file system's times, in nanoseconds: FAT's is two seconds."""
    return 2 * 10**9 if stat.st_mtime_ns % 10**9 == 0 else 5 * 10**7


def _hash_file(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def array_sha256(array: np.ndarray) -> str:
    """SHA-256 of an array's type, shape and values."""
    described = f"{array.dtype.str}{array.shape}".encode()
    return hashlib.sha256(described + np.ascontiguousarray(array).tobytes()).hexdigest()
