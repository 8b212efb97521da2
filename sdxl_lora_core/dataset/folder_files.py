"""Lists the images, caption files and masks in a dataset folder, in the layouts that people and other trainers use."""

from __future__ import annotations

import contextlib
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from .caption_text import decode_unicode, legacy_encoding, valid_unicode

# Includes formats that Pillow may not read: such a file is then reported instead of silently ignored.
IMAGE_SUFFIXES = {
    *(".png", ".apng", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"),
    *(".heic", ".heif", ".jxl", ".jp2", ".psd"),
}
CAPTION_SUFFIXES = (".txt", ".caption")
METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
# Of macOS, Synology, QNAP, Windows and Linux; hidden files and folders are ignored as well.
_SYSTEM_NAMES = {
    *("__macosx", "@eadir", "#recycle", "#snapshot", "@recycle", "$recycle.bin", "system volume information"),
    *("lost+found", "thumbs.db", "desktop.ini"),
}
_SAMPLE = 64 * 1024  # bytes that are enough to detect an encoding
_MASK_FOLDERS = ("masks", "mask")
_MASK_ENDING = "-masklabel"  # OneTrainer's


@dataclass(frozen=True)
class Problem:
    """Why a file is skipped or, with skipped=False, what to check about a file that is used.

    `file` is empty for what is true of several files of the folder. `no_caption`: an image is skipped for want of one.
    """

    file: str
    reason: str
    skipped: bool = True
    no_caption: bool = False


@dataclass(frozen=True)
class ImageFile:
    """An image of a dataset folder. `key` is its path relative to the folder, with slashes, in Unicode normal form C.

    `repeats` and `folder_caption` are those of its kohya folder, such as `10_cat`.
    """

    key: str
    path: Path
    repeats: int = 1
    folder_caption: str = ""
    is_regularisation: bool = False

    @property
    def stem(self) -> str:
        """The key without its suffix."""
        return stem_of(self.key)


@dataclass
class FolderFiles:
    """The files of a dataset folder. Texts are captions and metadata by key; masks are by the stem of their image.

    `images` is a list because two files can have the same key (composed and decomposed spellings of one name);
    `left_out` are images that the layout of the folder does not use (see layout.arrange).
    `ignored` is the number of hidden files and of files that systems write into folders.
    """

    root: Path
    images: list[ImageFile] = field(default_factory=list)
    left_out: list[ImageFile] = field(default_factory=list)
    texts: dict[str, Path] = field(default_factory=dict)
    masks: dict[str, Path] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    ignored: int = 0

    @cached_property
    def texts_by_folded_name(self) -> dict[str, list[str]]:
        """The keys of texts by their names in folded case."""
        names: dict[str, list[str]] = {}
        for name in self.texts:
            names.setdefault(name.casefold(), []).append(name)
        return names

    @cached_property
    def legacy_encoding(self) -> str:
        """The encoding of the texts that are not Unicode."""
        texts, size = [], 0
        for path in self.texts.values():
            with contextlib.suppress(OSError, ValueError), open(path, "rb") as file:
                text = file.read(_SAMPLE)
                if len(text) == _SAMPLE:  # cut off, perhaps within a character
                    text = text[: text.rfind(b"\n") + 1]
                if size < _SAMPLE and decode_unicode(text) is None:
                    texts.append(text)
                    size += len(text)
        return legacy_encoding(texts)


def scan_folder(root: Path) -> FolderFiles:
    """Finds every image, caption and metadata file below `root`; images are sorted by key.

    All other files, links to files outside `root`, linked folders and unreadable folders are reported in `problems`.
    """
    files = FolderFiles(root.resolve())
    for path in _walk(files):
        _add(files, path)
    files.images.sort(key=lambda image: (image.key.casefold(), image.key, image.path.as_posix()))
    _separate_masks(files)
    return files


def key_of(relative: str) -> str:
    """The key of a path relative to the dataset folder."""
    return unicodedata.normalize("NFC", valid_unicode(relative))


def stem_of(key: str) -> str:
    """A key without its suffix."""
    return str(PurePosixPath(key).with_suffix(""))


def _add(files: FolderFiles, path: Path) -> None:
    key = key_of(path.relative_to(files.root).as_posix())
    suffix = PurePosixPath(key).suffix.lower()
    is_text = suffix in CAPTION_SUFFIXES or path.name.lower() in METADATA_NAMES
    if not path.is_file():
        files.problems.append(Problem(key, "is not a file, or is a broken link"))
    elif path.is_symlink() and not path.resolve().is_relative_to(files.root):
        files.problems.append(Problem(key, "is a link to a file outside the folder: put the file itself here"))
    elif suffix in IMAGE_SUFFIXES:
        files.images.append(ImageFile(key, path))
    elif not is_text:
        files.problems.append(Problem(key, "is not an image, a caption or a mask"))
    elif (name := str(PurePosixPath(key).with_suffix(suffix))) in files.texts:
        files.problems.append(Problem(key, f"has the same name as another text, {files.texts[name].name}"))
    else:
        files.texts[name] = path


def _walk(files: FolderFiles) -> Iterator[Path]:
    """Every file that is not ignored."""

    def note(error: OSError) -> None:
        name = Path(error.filename).relative_to(files.root).as_posix()
        files.problems.append(Problem(key_of(name), f"cannot be read: {error.strerror}"))

    for folder, subfolders, names in os.walk(files.root, onerror=note):
        for name in sorted(subfolders):
            if (link := Path(folder, name)).is_symlink():
                key = key_of(link.relative_to(files.root).as_posix())
                files.problems.append(Problem(key, "is a linked folder, which is not followed: put the files here"))
            elif _is_ignored(name):
                files.ignored += sum(len(found) for _, _, found in os.walk(link))
        subfolders[:] = sorted(name for name in subfolders if not _is_ignored(name))
        files.ignored += sum(map(_is_ignored, names))
        yield from (Path(folder, name) for name in sorted(names) if not _is_ignored(name))


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def _separate_masks(files: FolderFiles) -> None:
    """Moves the mask of another image from `images` to `masks`. Masks without an image are reported."""
    stems = {image.stem for image in files.images}
    kept: list[ImageFile] = []
    orphans: list[ImageFile] = []
    for image in files.images:
        candidates = _masked_stems(image.stem)
        if owner := next((stem for stem in candidates if stem in stems), None):
            files.masks.setdefault(owner, image.path)
            if files.masks[owner] != image.path:
                files.problems.append(Problem(image.key, f"is a second mask of {owner}, which is not used"))
        else:
            (orphans if candidates else kept).append(image)
    if not files.masks:  # a folder named masks may be one of images
        places = {image: place for place, image in enumerate(files.images)}
        kept = sorted([*kept, *orphans], key=places.__getitem__)
    else:
        files.problems += [Problem(image.key, "is a mask of no image here") for image in orphans]
    files.images = kept


def _masked_stems(stem: str) -> list[str]:
    """The possible stems of the image that a mask belongs to; empty for a name that is not one of a mask."""
    if stem.endswith(_MASK_ENDING):
        return [stem.removesuffix(_MASK_ENDING)]
    *folders, name = stem.split("/")
    for number, folder in enumerate(folders):
        if folder in _MASK_FOLDERS:
            before, after = folders[:number], [*folders[number + 1 :], name]
            inside = "/".join([*before, *after])
            return [inside, f"images/{inside}", f"img/{inside}"]
    return []
