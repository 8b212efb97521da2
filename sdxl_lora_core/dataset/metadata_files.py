"""Reads the captions in metadata.csv and metadata.jsonl files, and writes those of metadata.csv."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..files import safe_path
from ..messages import shown
from .caption_text import clean_caption, decode_unicode, valid_unicode
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


@dataclass(frozen=True)
class CaptionTable:
    """The folder's metadata.csv as it is, to be written with new captions.

    `rows_of` are the numbers of the rows of each image by key, and
    `refused` says of images why their row cannot be written: it cannot be read, or it is not the only one.
    """

    files: FolderFiles
    path: Path
    delimiter: str
    header: Sequence[str]
    rows: Sequence[list[str]]
    rows_of: Mapping[str, int]
    refused: Mapping[str, str]

    @classmethod
    def read(cls, files: FolderFiles) -> CaptionTable:
        """Raises ValueError for a file that is not Unicode, no CSV, or without the columns file_name and caption."""
        name = next((name for name in files.texts if name.casefold() == TABLE), None)
        path = files.root / TABLE if name is None else files.texts[name]
        if name is None and os.path.lexists(path):
            raise ValueError(f"{TABLE} is no text file of this folder, or is a link out of it: remove it")
        text = (_unicode_text(path) if name else "").lstrip() or ",".join(_NEW_COLUMNS)
        delimiter = _delimiter(text)
        try:
            reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
            header, *numbered = [(row, reader.line_num) for row in reader if row]
        except csv.Error as error:
            raise ValueError(f"{TABLE} cannot be read as CSV: {error}") from error
        if (columns := _columns(header[0])) is None:
            raise ValueError(f"{TABLE} needs a first line with the columns file_name and caption: add them")
        places = [header[0].index(columns[wanted]) for wanted in _NEW_COLUMNS]
        rows_of, refused = _owners(files, numbered, len(header[0]), places)
        return cls(files, path, delimiter, header[0], [row for row, _ in numbered], rows_of, refused)

    def has_room_for(self, key: str) -> bool:
        """Whether a row with this image's key would be read as that image's."""
        try:
            images = _Images(image.key for image in self.files.images)
            return _read_row(self.files, PurePosixPath(), images, {"file_name": key, "caption": ""})[0] == key
        except ValueError:
            return False

    def with_captions(self, captions: Mapping[str, str]) -> str:
        """The text of the file with new captions by image key. All other columns and rows stay."""
        columns = _columns(self.header) or {}
        file_column, caption_column = (self.header.index(columns[wanted]) for wanted in _NEW_COLUMNS)
        rows = [list(row) for row in self.rows]
        for key, caption in captions.items():
            if key not in self.rows_of:
                rows.append([""] * len(self.header))
                rows[-1][file_column] = key
            row = rows[self.rows_of.get(key, -1)]
            row += [""] * (len(self.header) - len(row))
            row[caption_column] = caption
        return "".join(f"{self._line(row)}\n" for row in (self.header, *rows))

    def _line(self, row: Sequence[str]) -> str:
        line = io.StringIO()
        writer = csv.writer(line, delimiter=self.delimiter, lineterminator="\r\n")  # cells with either are quoted
        writer.writerow(row)
        return line.getvalue().removesuffix("\r\n")


def _unicode_text(path: Path) -> str:
    if path.stat().st_size > MAX_METADATA_BYTES:
        raise ValueError(f"{TABLE} is larger than {MAX_METADATA_BYTES // 1024} KiB: shorten it")
    text = decode_unicode(path.read_bytes())
    if text is None:
        raise ValueError(f"{TABLE} is not UTF-8, so that writing to it could damage its captions: save it as UTF-8")
    return text


def _owners(
    files: FolderFiles, numbered: Sequence[tuple[list[str], int]], width: int, places: Sequence[int]
) -> tuple[dict[str, int], dict[str, str]]:
    """The rows of images by key, and why some images have none that can be written."""
    images = _Images(image.key for image in files.images)
    rows_of: dict[str, int] = {}
    refused: dict[str, str] = {}
    for number, (row, line) in enumerate(numbered):
        file_name, caption = (row[place] if place < len(row) else "" for place in places)
        try:
            key, _ = _read_row(files, PurePosixPath(), images, {"file_name": file_name, "caption": ""})
        except ValueError:
            continue  # of an image that is gone: its row stays
        too_long = len(valid_unicode(caption).encode()) > MAX_CAPTION_BYTES
        if len(row) > width or too_long:
            refused[key] = f"line {line} of {TABLE} cannot be read: repair it"
        elif key in rows_of:
            refused[key] = f"it has several lines in {TABLE}: leave one"
        rows_of[key] = number
    return {key: number for key, number in rows_of.items() if key not in refused}, refused


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
