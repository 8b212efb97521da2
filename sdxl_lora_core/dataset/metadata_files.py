"""Reads the captions in metadata.csv and metadata.jsonl files, and writes those of metadata.csv."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from ..files import safe_path
from ..messages import shown
from .caption_text import clean_caption, valid_unicode
from .folder_files import METADATA_NAMES, FolderFiles, Problem, key_of
from .text_files import MAX_CAPTION_BYTES, read_text

MAX_METADATA_BYTES = 64 * 2**20
TABLE = "metadata.csv"
_NEW_COLUMNS = ("file_name", "caption")
_IMAGE_COLUMNS = ("file_name", "filename", "file", "image", "image_path", "path")
_CAPTION_COLUMNS = ("caption", "captions", "text", "prompt", "description")
_DELIMITERS = ",;\t|"

Row = Mapping[str, Any]


def read_metadata(files: FolderFiles) -> dict[str, list[str]]:
    """The captions by image key, from every metadata file in the folder and its subfolders.

    Paths are relative to the file, or to images/ beside it. Columns are named file_name and caption (or text); other
    usual names, any case and the delimiters , ; | and tab are understood. Rows that cannot be used are reported.
    """
    captions: dict[str, list[str]] = {}
    images = _Images(image.key for image in files.images)
    for name in [name for name in files.texts if PurePosixPath(name).name.lower() in METADATA_NAMES]:
        for line, row in _rows(files, name):
            try:
                key, texts = _read_row(files, PurePosixPath(name).parent, images, row)
                if captions.setdefault(key, texts) != texts:
                    raise ValueError(f"{shown(key)} already has a different caption, which is used")
            except ValueError as error:
                files.problems.append(Problem(f"{name} line {line}", str(error)))
    return captions


def with_captions(files: FolderFiles, captions: Mapping[str, str]) -> str:
    """The text of the folder's metadata.csv with new captions by image key. All other columns and rows stay.

    Raises ValueError for a file without the columns file_name and caption.
    """
    text = read_text(files, TABLE, MAX_METADATA_BYTES) if TABLE in files.texts else ",".join(_NEW_COLUMNS)
    delimiter = _delimiter(text)
    header, *rows = list(csv.reader(io.StringIO(text.lstrip(), newline=""), delimiter=delimiter, skipinitialspace=True))
    file_column, caption_column = _places(header)
    keys = _keys_of_rows(files, rows, file_column)
    new = dict(captions)
    for row, key in zip(rows, keys, strict=True):
        if key is not None and key in captions:
            row += [""] * (len(header) - len(row))
            row[caption_column] = new.pop(key, captions[key])
    for key, caption in new.items():
        row = [""] * len(header)
        row[file_column], row[caption_column] = key, caption
        rows.append(row)
    written = io.StringIO()
    csv.writer(written, delimiter=delimiter, lineterminator="\n").writerows([header, *rows])
    return written.getvalue()


def table_keys(files: FolderFiles) -> set[str]:
    """The keys of the images that have a row in the folder's metadata.csv; empty if that cannot be read."""
    if TABLE not in files.texts:
        return set()
    try:
        text = read_text(files, TABLE, MAX_METADATA_BYTES)
        header, *rows = list(csv.reader(io.StringIO(text.lstrip(), newline=""), delimiter=_delimiter(text)))
        return {key for key in _keys_of_rows(files, rows, _places(header)[0]) if key}
    except (ValueError, csv.Error):
        return set()


def _places(header: Sequence[str]) -> tuple[int, int]:
    columns = _columns(header)
    if columns is None:
        raise ValueError(f"{TABLE} needs a first line with the columns file_name and caption: add them")
    return header.index(columns["file_name"]), header.index(columns["caption"])


def _keys_of_rows(files: FolderFiles, rows: Iterable[Sequence[str]], column: int) -> list[str | None]:
    images = _Images(image.key for image in files.images)
    found: list[str | None] = []
    for row in rows:
        try:
            cells = {"file_name": row[column] if column < len(row) else None, "caption": ""}
            found.append(_read_row(files, PurePosixPath(), images, cells)[0])
        except ValueError:
            found.append(None)  # of an image that is gone: its row stays
    return found


class _Images:
    """The keys of images, also by the same letters in another case."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._by_folded: defaultdict[str, list[str]] = defaultdict(list)
        for key in keys:
            self._by_folded[key.casefold()].append(key)

    def find(self, wanted: str) -> str | None:
        alike = self._by_folded.get(wanted.casefold(), [])
        return wanted if wanted in alike else alike[0] if len(alike) == 1 else None


def _rows(files: FolderFiles, name: str) -> Iterator[tuple[int, Row]]:
    """The rows with their lines; columns are named file_name and caption."""
    try:
        text = read_text(files, name, MAX_METADATA_BYTES)
        yield from (_csv_rows if name.lower().endswith(".csv") else _jsonl_rows)(text, name, files.problems)
    except ValueError as error:
        files.problems.append(Problem(name, str(error)))


def _csv_rows(text: str, name: str, problems: list[Problem]) -> Iterator[tuple[int, Row]]:
    stream = io.StringIO(text.lstrip(), newline="")
    reader = csv.DictReader(stream, delimiter=_delimiter(text), skipinitialspace=True)
    try:
        columns = _columns(reader.fieldnames or ())
        if columns is None:
            found = ", ".join(map(clean_caption, list(reader.fieldnames or ())[:6]))
            raise ValueError(f"needs a first line with the columns file_name and caption, it has: {found}")
        for row in reader:
            if None in row:
                reason = "has more columns than the header: put the caption in double quotes"
                problems.append(Problem(f"{name} line {reader.line_num}", reason))
            else:
                yield reader.line_num, {wanted: row[found] for wanted, found in columns.items()}
    except csv.Error as error:
        problems.append(Problem(f"{name} line {reader.line_num}", f"cannot be read as CSV: {error}"))


def _delimiter(text: str) -> str:
    return max(_DELIMITERS, key=text.lstrip().partition("\n")[0].count)


def _jsonl_rows(text: str, name: str, problems: list[Problem]) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(Problem(f"{name} line {number}", f"is not JSON: {error}"))
            continue
        columns = _columns(row) if isinstance(row, dict) else None
        yield number, {wanted: row[found] for wanted, found in (columns or {}).items()}


def _columns(names: Iterable[str]) -> dict[str, str] | None:
    """The columns of the file name and the caption; None unless there is one of each."""
    by_plain_name = {name.strip().casefold().replace(" ", "_"): name for name in names if isinstance(name, str)}
    images = [by_plain_name[name] for name in _IMAGE_COLUMNS if name in by_plain_name]
    captions = [by_plain_name[name] for name in _CAPTION_COLUMNS if name in by_plain_name]
    return {"file_name": images[0], "caption": captions[0]} if images and captions else None


def _read_row(files: FolderFiles, folder: PurePosixPath, images: _Images, row: Row) -> tuple[str, list[str]]:
    file_name, caption = row.get("file_name"), row.get("caption")
    texts: list[Any] = caption if isinstance(caption, list) else [caption]
    if not isinstance(file_name, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError("needs a file_name and a caption (or text)")
    relative = file_name.strip().replace("\\", "/").removeprefix("./")
    safe_path(files.root / folder, relative)
    keys = (key_of((folder / parent / relative).as_posix()) for parent in ("", "images"))
    key = next((found for key in keys if (found := images.find(key))), None)
    if key is None:
        raise ValueError(f"names {shown(clean_caption(file_name))}, which is not an image in this folder")
    if len(valid_unicode("".join(texts)).encode()) > MAX_CAPTION_BYTES:
        raise ValueError(f"its caption is larger than {MAX_CAPTION_BYTES // 1024} KiB: shorten it")
    return key, texts
