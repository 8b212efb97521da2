"""Reads the text files of a dataset folder."""

from __future__ import annotations

from .caption_text import can_detect_encodings, decode_legacy, decode_unicode
from .folder_files import FolderFiles, Problem

MAX_CAPTION_BYTES = 64 * 1024


def read_text(files: FolderFiles, name: str, limit: int) -> str:
    """The text of at most `limit` bytes with the key `name`. Raises ValueError naming it.

    An encoding other than Unicode is detected from all such texts of the folder, and reported in `files.problems`.
    """
    try:
        with open(files.texts[name], "rb") as handle:
            data = handle.read(limit + 1)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from error
    if len(data) > limit:
        raise ValueError(f"{name} is larger than {limit // 1024} KiB: shorten it")
    try:
        text, encoding = decode_unicode(data), ""
        if text is None:
            text, encoding = decode_legacy(data, files.legacy_encoding)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from error
    if encoding:
        detect = "" if can_detect_encodings() else ", or python -m pip install charset-normalizer to detect others"
        reason = f"is not UTF-8 and was read as {encoding}: check its letters and save it as UTF-8{detect}"
        files.problems.append(Problem(name, reason, skipped=False))
    return text
