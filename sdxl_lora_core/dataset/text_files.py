"""Reads the text files of a dataset folder."""

from __future__ import annotations

from .caption_text import decode_text
from .folder_files import FolderFiles, Problem

MAX_CAPTION_BYTES = 64 * 1024


def read_text(files: FolderFiles, name: str, limit: int) -> str:
    """The text of at most `limit` bytes with the key `name`. Raises ValueError naming it.

    An encoding other than Unicode is reported in `files.problems`.
    """
    try:
        with open(files.texts[name], "rb") as handle:
            data = handle.read(limit + 1)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from error
    if len(data) > limit:
        raise ValueError(f"{name} is larger than {limit // 1024} KiB: shorten it")
    try:
        text, encoding = decode_text(data)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from error
    if encoding in ("cp1252", "latin-1"):
        reason = f"is not UTF-8 and was read as {encoding}: check the accents and save it as UTF-8"
        files.problems.append(Problem(name, reason, skipped=False))
    return text
