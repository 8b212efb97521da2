"""Changes to dataset folders that a page asks for: captions that are written, and folders of uploaded files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path, PurePosixPath

from PIL import Image, ImageDraw

from ..files import check_name, claim_name, require_file_names, safe_path, write_text_atomic
from ..images.decode import decode, open_image, strict_pillow
from ..messages import shown
from .caption_text import decode_legacy, decode_unicode, legacy_encoding
from .captions import caption_file
from .folder_files import CAPTION_SUFFIXES, IMAGE_SUFFIXES, METADATA_NAMES
from .metadata_files import MAX_METADATA_BYTES
from .text_files import MAX_CAPTION_BYTES

MAX_IMAGE_BYTES = 64 * 2**20
MAX_FOLDER_FILES = 10_000  # of an uploaded folder
_THUMBNAIL = 256  # px, of the longer side


class CaptionWriter:
    """Writes the captions of images, and removes the caption files that it has created."""

    def __init__(self) -> None:
        self._created: set[Path] = set()

    def write(self, folder: Path, image: str, text: str | None) -> tuple[Path, str | None]:
        """Makes `text` the caption of an image, by its path relative to `folder`. None removes a file that this writer
        has created.

        Returns the caption file and its text before, None if there was no such file. Raises FileNotFoundError if there
        is no such image, ValueError if its caption cannot be written: empty, too long, or in a metadata file.
        """
        path = caption_file(folder, image)
        before = _read(path) if path.exists() else None
        if text is None:
            self._remove(path)
        else:
            _check_caption(text)
            write_text_atomic(path, text)
            if before is None:
                self._created.add(path)
        return path, before

    def _remove(self, path: Path) -> None:
        if path not in self._created:
            raise ValueError(f"{path.name} was not created on this page, so it is not removed: write another caption")
        self._created.remove(path)
        path.unlink(missing_ok=True)


class Uploads:
    """Dataset folders made of uploaded files. Others are never added to, and no file is ever overwritten."""

    def __init__(self) -> None:
        self._made: set[Path] = set()

    def new_folder(self, root: Path, name: str) -> Path:
        """Makes the folder `name` in `root`, numbered if the name is taken. Raises as check_name."""
        check_folder_name(name)

        def claim(free: str) -> Path | None:
            path = safe_path(root, free)
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                return None
            return path

        made = claim_name(name, claim)
        self._made.add(made)
        return made

    def find_folder(self, root: Path, name: str) -> Path:
        """A folder in `root` that new_folder has made. Raises ValueError for others."""
        path = safe_path(root, name)
        if path not in self._made or not path.is_dir():
            raise ValueError(
                f"{shown(name)} was not made by an upload: upload to a new folder, or copy the files there"
            )
        if sum(len(names) for _, _, names in os.walk(path)) >= MAX_FOLDER_FILES:
            raise ValueError(f"{name} has {MAX_FOLDER_FILES} files, which is the most: upload to a new folder")
        return path

    def add(self, folder: Path, name: str, file: Path) -> str:
        """Moves a checked file into a folder. Returns its name there, with a number if `name` is taken."""
        require_file_names(folder, {"file": name}, ending="")
        wanted = PurePosixPath(name)

        def claim(stem: str) -> Path | None:
            path = safe_path(folder, str(wanted.with_name(stem + wanted.suffix)))
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                path.touch(exist_ok=False)
            except FileExistsError:
                return None
            return path

        path = claim_name(wanted.stem, claim)
        os.replace(file, path)
        return path.relative_to(folder.resolve()).as_posix()


def check_folder_name(name: str) -> None:
    """Raises ValueError unless a new folder may have this name."""
    check_name("folder", name, ending="")


def upload_limit(name: str) -> int:
    """The most bytes that an uploaded file of this name (a relative path) may have.

    Raises ValueError for a name that is not valid everywhere, and for files that are no part of a dataset.
    """
    check_name("file", name, ending="", subfolders=True)
    path = PurePosixPath(name)
    limits: Mapping[str, int] = {
        **dict.fromkeys(IMAGE_SUFFIXES, MAX_IMAGE_BYTES),
        **dict.fromkeys(CAPTION_SUFFIXES, MAX_CAPTION_BYTES),
    }
    if path.name.lower() in METADATA_NAMES:
        return MAX_METADATA_BYTES
    if path.suffix.lower() not in limits:
        kinds = f"an image, {' or '.join(CAPTION_SUFFIXES)}, or {' or '.join(METADATA_NAMES)}"
        raise ValueError(f"{shown(name)} is not part of a dataset: give {kinds}")
    return limits[path.suffix.lower()]


def check_upload(name: str, file: Path) -> None:
    """Raises ValueError unless `file` has what its name promises: an image that can be trained on, or text."""
    try:
        if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES:
            with strict_pillow():
                decode(file)
        else:
            decode_unicode(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{shown(name)} {error}") from error


def thumbnail(folder: Path, image: str) -> bytes:
    """A JPEG of at most 256 px on a side of an image in a dataset folder, a red cross if it cannot be read.

    Raises FileNotFoundError if there is no such file, ValueError as safe_path, and for the name of no image.
    """
    path = safe_path(folder, image)
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"{shown(image)} is not an image: give the name of one in {folder.name}")
    try:
        picture = open_image(path)
    except ValueError:
        picture = _cross()
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    data = BytesIO()
    picture.save(data, "JPEG", quality=85)
    return data.getvalue()


def _cross() -> Image.Image:
    picture = Image.new("RGB", (64, 64), "#222")
    lines = ImageDraw.Draw(picture)
    lines.line((20, 20, 44, 44), "#ff7b72", 4)
    lines.line((20, 44, 44, 20), "#ff7b72", 4)
    return picture


def _read(path: Path) -> str:
    data = path.read_bytes()
    text = decode_unicode(data)
    return decode_legacy(data, legacy_encoding([data]))[0] if text is None else text


def _check_caption(text: str) -> None:
    if not text.strip():
        raise ValueError("the caption is empty: describe what the image shows")
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("the caption contains a null character or half a character: type it again")
    if (size := len(text.encode())) > MAX_CAPTION_BYTES:
        raise ValueError(f"the caption takes {size} bytes, the most are {MAX_CAPTION_BYTES}: shorten it")
