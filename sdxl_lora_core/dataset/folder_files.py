"""Lists the images, caption files and masks in a dataset folder, in the layouts that people and other trainers use."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from .caption_text import valid_unicode

_KOHYA_FOLDER = re.compile(r"([1-9][0-9]{0,2}|1000)_(.+)")
# Includes formats that Pillow may not read: such a file is then reported instead of silently ignored.
IMAGE_SUFFIXES = {
    *(".png", ".apng", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"),
    *(".heic", ".heif", ".jxl", ".jp2", ".psd"),
}
CAPTION_SUFFIXES = (".txt", ".caption")
METADATA_NAMES = ("metadata.csv", "metadata.jsonl")


@dataclass(frozen=True)
class Problem:
    """Why a file is skipped or, with skipped=False, what to check about a file that is used."""

    file: str
    reason: str
    skipped: bool = True


@dataclass
class FolderFiles:
    """The files of a dataset folder by key: the path relative to it, with slashes, in Unicode normal form C.

    `images` is a list because two files can have the same key (composed and decomposed spellings of one name).
    `kohya` maps each subfolder such as `10_cat` to its repeats and name, if all images are in such folders.
    """

    root: Path
    images: list[tuple[str, Path]] = field(default_factory=list)
    texts: dict[str, Path] = field(default_factory=dict)
    masks: dict[str, Path] = field(default_factory=dict)
    kohya: dict[str, tuple[int, str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def repeats(self, key: str) -> int:
        return self.kohya.get(first_folder(key), (1, ""))[0]

    def mask(self, key: str) -> Path | None:
        """The mask of an image: masks/<name> with any image suffix."""
        return self.masks.get(stem_of(key).removeprefix("images/"))


def scan_folder(root: Path) -> FolderFiles:
    """Finds every image, caption and metadata file below `root` except hidden ones; images are sorted by key.

    Links to files outside `root`, linked folders and unreadable folders are reported in `problems` and not followed.
    """
    files = FolderFiles(root.resolve())
    for path in _walk(files):
        key = key_of(path.relative_to(files.root).as_posix())
        suffix = PurePosixPath(key).suffix.lower()
        if suffix not in IMAGE_SUFFIXES and suffix not in CAPTION_SUFFIXES and path.name not in METADATA_NAMES:
            continue
        if not path.is_file():
            files.problems.append(Problem(key, "is not a file, or is a broken link"))
        elif path.is_symlink() and not path.resolve().is_relative_to(files.root):
            files.problems.append(Problem(key, "is a link to a file outside the folder: put the file itself here"))
        elif suffix in IMAGE_SUFFIXES:
            files.images.append((key, path))
        else:
            files.texts[str(PurePosixPath(key).with_suffix(suffix))] = path
    files.images.sort(key=lambda item: (item[0].casefold(), item[0], item[1].as_posix()))
    _separate_masks(files)
    _leave_out_images_outside(files)
    files.kohya = _kohya_folders(files.images)
    return files


def key_of(relative: str) -> str:
    """The key of a path relative to the dataset folder."""
    return unicodedata.normalize("NFC", valid_unicode(relative))


def stem_of(key: str) -> str:
    """A key without its suffix."""
    return str(PurePosixPath(key).with_suffix(""))


def first_folder(key: str) -> str:
    """The topmost folder in a key, empty for a file directly in the dataset folder."""
    return key.split("/", 1)[0] if "/" in key else ""


def _walk(files: FolderFiles) -> Iterator[Path]:
    def note(error: OSError) -> None:
        name = Path(error.filename).relative_to(files.root).as_posix()
        files.problems.append(Problem(key_of(name), f"cannot be read: {error.strerror}"))

    for folder, subfolders, names in os.walk(files.root, onerror=note):
        for name in sorted(subfolders):
            if (link := Path(folder, name)).is_symlink():
                key = key_of(link.relative_to(files.root).as_posix())
                files.problems.append(Problem(key, "is a linked folder, which is not followed: put the files here"))
        subfolders[:] = sorted(name for name in subfolders if not _is_hidden(name))
        yield from (Path(folder, name) for name in sorted(names) if not _is_hidden(name))


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


def _kohya_folders(images: list[tuple[str, Path]]) -> dict[str, tuple[int, str]]:
    folders = {first_folder(key): _KOHYA_FOLDER.fullmatch(first_folder(key)) for key, _ in images}
    kohya = {folder: (int(match[1]), match[2]) for folder, match in folders.items() if match}
    return kohya if len(kohya) == len(folders) else {}


def _separate_masks(files: FolderFiles) -> None:
    """Moves an image in masks/ that has the name of another image from `images` to `masks`."""
    stems = {stem_of(key).removeprefix("images/") for key, _ in files.images if not key.startswith("masks/")}
    for key, path in files.images:
        if key.startswith("masks/") and (stem := stem_of(key).removeprefix("masks/")) in stems:
            files.masks.setdefault(stem, path)
    masks = set(files.masks.values())
    files.images = [(key, path) for key, path in files.images if path not in masks]


def _leave_out_images_outside(files: FolderFiles) -> None:
    """If there is a folder images/, only the images in it are used."""
    if not any(key.startswith("images/") for key, _ in files.images):
        return
    for key, _ in files.images:
        if not key.startswith("images/"):
            files.problems.append(Problem(key, "is outside images/: move it there to use it"))
    files.images = [(key, path) for key, path in files.images if key.startswith("images/")]
