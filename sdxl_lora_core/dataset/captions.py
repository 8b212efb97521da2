"""Finds the pictures of a folder and the caption of each, in the layouts that people and other trainers use."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ..files import safe_path

_KOHYA_FOLDER = re.compile(r"([1-9][0-9]{0,2}|1000)_(.+)")
# With formats that cannot be read here: such a file is then named in the report instead of overlooked.
IMAGE_SUFFIXES = {
    *(".png", ".apng", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"),
    *(".heic", ".heif", ".jxl", ".jp2", ".psd"),
}
CAPTION_SUFFIXES = (".txt", ".caption")
METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
MAX_CAPTION_BYTES = 64 * 1024
MAX_METADATA_BYTES = 64 * 2**20

_BOMS = (  # UTF-32 first: its little-endian mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


@dataclass(frozen=True)
class Problem:
    """A file that is not used (skipped), or is used with a doubt that the person should know of."""

    file: str
    reason: str
    skipped: bool = True


@dataclass
class FolderFiles:
    """What lies in a dataset folder. Keys are paths relative to it, with slashes, in Unicode's composed form.

    `kohya` has the repeats and the name of each subfolder `10_cat`, when all pictures lie in such folders.
    """

    root: Path
    images: list[tuple[str, Path]] = field(default_factory=list)
    texts: dict[str, Path] = field(default_factory=dict)
    masks: dict[str, Path] = field(default_factory=dict)
    kohya: dict[str, tuple[int, str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def repeats(self, key: str) -> int:
        return self.kohya.get(_first_folder(key), (1, ""))[0]

    def mask(self, key: str) -> Path | None:
        """masks/<name> of a picture, whatever its suffix."""
        return self.masks.get(_stem(key).removeprefix("images/"))


def scan_folder(root: Path) -> FolderFiles:
    """Every picture, caption and metadata file, hidden ones left out, sorted by key. Links may not lead outside."""
    files = FolderFiles(root.resolve())
    for path in _walk(files):
        key = _key(path.relative_to(files.root).as_posix())
        suffix = PurePosixPath(key).suffix.lower()
        if suffix not in IMAGE_SUFFIXES and suffix not in CAPTION_SUFFIXES and path.name not in METADATA_NAMES:
            continue
        if not path.is_file():
            files.problems.append(Problem(key, "is no file, or a link to nothing"))
        elif path.is_symlink() and not path.resolve().is_relative_to(files.root):
            files.problems.append(Problem(key, "is a link that leads outside of the folder: put the file itself here"))
        elif suffix in IMAGE_SUFFIXES:
            files.images.append((key, path))
        else:
            files.texts[str(PurePosixPath(key).with_suffix(suffix))] = path
    files.images.sort(key=lambda item: (item[0].casefold(), item[0], item[1].as_posix()))
    _set_aside_masks(files)
    _set_aside_pictures_beside_images(files)
    files.kohya = _kohya_folders(files.images)
    return files


def read_captions(files: FolderFiles, per_line: bool = False) -> dict[str, tuple[str, ...]]:
    """The captions of each picture that has any, by its key; the others join files.problems.

    metadata.csv (file_name,caption) and metadata.jsonl (file_name,text) come first, in the folder itself or in
    images/; then captions/<name>.txt or .caption for images/<name>; then a .txt or .caption beside the picture; then
    the name of a kohya folder. A list in metadata.jsonl holds several captions, and so does a text of several lines
    with `per_line`.
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
        files.problems.append(Problem(key, "its caption is empty: write what the picture shows"))
        del captions[key]
    return captions


def decode_text(data: bytes) -> tuple[str, str]:
    """The text and its encoding: by its byte order mark, else UTF-8, else Windows-1252, else Latin-1.

    Raises ValueError if it is no text at all.
    """
    marked = next((name for mark, name in _BOMS if data.startswith(mark)), None)
    try:
        text, encoding = (data.decode(marked), marked) if marked else _decode_unmarked(data)
    except UnicodeDecodeError as error:
        raise ValueError(f"is broken {marked} text: save it as UTF-8") from error
    if "\0" in text:
        raise ValueError("is no text, or UTF-16 without its mark: save it as UTF-8")
    return text, encoding


def clean_caption(text: str) -> str:
    """One line of valid Unicode: no control characters (a caption is shown in logs and pages), no double spaces."""
    return " ".join(_CONTROL.sub(" ", _valid(text)).split())


def holds_word(text: str, word: str) -> bool:
    """Whether `text` has `word` in it: whole words, in any case."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _decode_unmarked(data: bytes) -> tuple[str, str]:
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            return data.decode(encoding), encoding
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1"), "latin-1"


def _walk(files: FolderFiles) -> Iterator[Path]:
    def note(error: OSError) -> None:
        name = Path(error.filename).relative_to(files.root).as_posix()
        files.problems.append(Problem(_key(name), f"cannot be read: {error.strerror}"))

    for folder, subfolders, names in os.walk(files.root, onerror=note):
        for name in sorted(subfolders):
            if (link := Path(folder, name)).is_symlink():
                key = _key(link.relative_to(files.root).as_posix())
                files.problems.append(Problem(key, "is a linked folder, which is not followed: put the files here"))
        subfolders[:] = sorted(name for name in subfolders if not _is_hidden(name))
        yield from (Path(folder, name) for name in sorted(names) if not _is_hidden(name))


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


def _key(relative: str) -> str:
    return unicodedata.normalize("NFC", _valid(relative))


def _valid(text: str) -> str:
    # File systems and JSON may hold what is no Unicode; keys and captions are shown and hashed, so they have to be.
    return text.encode("utf-8", "replace").decode("utf-8")


def _stem(key: str) -> str:
    return str(PurePosixPath(key).with_suffix(""))


def _first_folder(key: str) -> str:
    return key.split("/", 1)[0] if "/" in key else ""


def _split(text: str, per_line: bool) -> tuple[str, ...]:
    captions = map(clean_caption, text.splitlines() if per_line else [text])
    return tuple(caption for caption in captions if caption)


def _kohya_folders(images: list[tuple[str, Path]]) -> dict[str, tuple[int, str]]:
    folders = {_first_folder(key): _KOHYA_FOLDER.fullmatch(_first_folder(key)) for key, _ in images}
    kohya = {folder: (int(match[1]), match[2]) for folder, match in folders.items() if match}
    return kohya if len(kohya) == len(folders) else {}


def _set_aside_masks(files: FolderFiles) -> None:
    """A picture in masks/ with the name of another picture is that one's mask."""
    stems = {_stem(key).removeprefix("images/") for key, _ in files.images if not key.startswith("masks/")}
    for key, path in files.images:
        if key.startswith("masks/") and (stem := _stem(key).removeprefix("masks/")) in stems:
            files.masks.setdefault(stem, path)
    masks = set(files.masks.values())
    files.images = [(key, path) for key, path in files.images if path not in masks]


def _set_aside_pictures_beside_images(files: FolderFiles) -> None:
    if not any(key.startswith("images/") for key, _ in files.images):
        return
    for key, _ in files.images:
        if not key.startswith("images/"):
            files.problems.append(Problem(key, "lies outside of images/: move it there to use it"))
    files.images = [(key, path) for key, path in files.images if key.startswith("images/")]


def _read_sidecar(files: FolderFiles, key: str) -> str:
    stem = _stem(key)
    stems = [stem]
    if key.startswith("images/"):
        stems.insert(0, f"captions/{stem.removeprefix('images/')}")
    for name in (stem + suffix for stem in stems for suffix in CAPTION_SUFFIXES):
        if name in files.texts:
            return _read_text(files, name, MAX_CAPTION_BYTES)
    if folder := files.kohya.get(_first_folder(key)):
        reason = f"has no caption: its folder's name is used, {clean_caption(folder[1])!r}"
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
        reason = f"is not UTF-8: read as {encoding}, look at its accents and save it as UTF-8"
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
                    raise ValueError(f"{key!r} already has another caption, which is used")
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
            problems.append(Problem(f"{name} line {number}", f"is no JSON: {error}"))


def _read_row(root: Path, base: PurePosixPath, known: set[str], row: Any) -> tuple[str, list[str]]:
    file_name = row.get("file_name") if isinstance(row, dict) else None
    caption = row.get("caption", row.get("text")) if isinstance(row, dict) else None
    texts: list[Any] = caption if isinstance(caption, list) else [caption]
    if not isinstance(file_name, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError("needs a file_name and a caption (or text)")
    safe_path(root / base, file_name)
    keys = _key((base / file_name).as_posix()), _key(f"images/{file_name}")
    key = next((key for key in keys if key in known), None)
    if key is None:
        raise ValueError(f"names {clean_caption(file_name)!r}, which is no picture in this folder")
    if len(_valid("".join(texts)).encode()) > MAX_CAPTION_BYTES:
        raise ValueError(f"its caption is larger than {MAX_CAPTION_BYTES // 1024} KiB: shorten it")
    return key, texts
