"""Reads the caption of each image: from metadata files, text files beside the images, or kohya's folder names."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ..files import safe_path
from .caption_text import clean_caption, decode_text, valid_unicode
from .folder_files import CAPTION_SUFFIXES, METADATA_NAMES, FolderFiles, Problem, first_folder, key_of, stem_of

MAX_CAPTION_BYTES = 64 * 1024
MAX_METADATA_BYTES = 64 * 2**20


def read_captions(files: FolderFiles, per_line: bool = False) -> dict[str, tuple[str, ...]]:
    """The captions by image key. Images without a caption are added to `files.problems`.

    The first source that has a caption for an image is used: metadata.csv (file_name,caption) or metadata.jsonl
    (file_name,text), in the folder or in images/; captions/<name>.txt or .caption for images/<name>; a .txt or
    .caption beside the image; the name of its kohya folder. A list in metadata.jsonl gives an image several captions,
    and with `per_line` so does each line of a text.
    """
    captions = _read_metadata(files, per_line)
    for key, _ in files.images:
        if key in captions:
            continue
        try:
            captions[key] = _split(_read_sidecar(files, key), per_line)
        except ValueError as error:
            files.problems.append(Problem(key, str(error)))
    for key in [key for key, found in captions.items() if not found]:
        files.problems.append(Problem(key, "its caption is empty: describe what the image shows"))
        del captions[key]
    return captions


def _split(text: str, per_line: bool) -> tuple[str, ...]:
    captions = map(clean_caption, text.splitlines() if per_line else [text])
    return tuple(caption for caption in captions if caption)


def _read_sidecar(files: FolderFiles, key: str) -> str:
    stem = stem_of(key)
    stems = [stem]
    if key.startswith("images/"):
        stems.insert(0, f"captions/{stem.removeprefix('images/')}")
    for name in (stem + suffix for stem in stems for suffix in CAPTION_SUFFIXES):
        if name in files.texts:
            return _read_text(files, name, MAX_CAPTION_BYTES)
    if folder := files.kohya.get(first_folder(key)):
        reason = f"has no caption: the name of its folder is used, {clean_caption(folder[1])!r}"
        files.problems.append(Problem(key, reason, skipped=False))
        return folder[1]
    raise ValueError(f"has no caption: write one to {stems[0]}.txt")


def _read_text(files: FolderFiles, name: str, limit: int) -> str:
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


def _read_metadata(files: FolderFiles, per_line: bool) -> dict[str, tuple[str, ...]]:
    captions: dict[str, tuple[str, ...]] = {}
    known = {key for key, _ in files.images}
    for name in (base + name for base in ("", "images/") for name in METADATA_NAMES if base + name in files.texts):
        for line, row in _rows(files, name):
            try:
                key, texts = _read_row(files.root, PurePosixPath(name).parent, known, row)
                found = tuple(caption for text in texts for caption in _split(text, per_line))
                if captions.setdefault(key, found) != found:
                    raise ValueError(f"{key!r} already has a different caption, which is used")
            except ValueError as error:
                files.problems.append(Problem(f"{name} line {line}", str(error)))
    return captions


def _rows(files: FolderFiles, name: str) -> Iterator[tuple[int, Any]]:
    try:
        text = _read_text(files, name, MAX_METADATA_BYTES)
    except ValueError as error:
        files.problems.append(Problem(name, str(error)))
        return
    yield from (_csv_rows if name.endswith(".csv") else _jsonl_rows)(text, name, files.problems)


def _csv_rows(text: str, name: str, problems: list[Problem]) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            if None in row:
                reason = "has more columns than the header: put the caption in double quotes"
                problems.append(Problem(f"{name} line {reader.line_num}", reason))
            else:
                yield reader.line_num, row
    except csv.Error as error:
        problems.append(Problem(f"{name} line {reader.line_num}", f"cannot be read as CSV: {error}"))


def _jsonl_rows(text: str, name: str, problems: list[Problem]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(Problem(f"{name} line {number}", f"is not JSON: {error}"))


def _read_row(root: Path, base: PurePosixPath, known: set[str], row: Any) -> tuple[str, list[str]]:
    file_name = row.get("file_name") if isinstance(row, dict) else None
    caption = row.get("caption", row.get("text")) if isinstance(row, dict) else None
    texts: list[Any] = caption if isinstance(caption, list) else [caption]
    if not isinstance(file_name, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError("needs a file_name and a caption (or text)")
    safe_path(root / base, file_name)
    keys = key_of((base / file_name).as_posix()), key_of(f"images/{file_name}")
    key = next((key for key in keys if key in known), None)
    if key is None:
        raise ValueError(f"names {clean_caption(file_name)!r}, which is not an image in this folder")
    if len(valid_unicode("".join(texts)).encode()) > MAX_CAPTION_BYTES:
        raise ValueError(f"its caption is larger than {MAX_CAPTION_BYTES // 1024} KiB: shorten it")
    return key, texts
