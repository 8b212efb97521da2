"""The captions of a folder as files: which image has which, and writing them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..dataset.captions import texts_of
from ..dataset.folder_files import FolderFiles, ImageFile, scan_folder
from ..dataset.layout import arrange
from ..dataset.metadata_files import TABLE, CaptionTable, read_metadata
from ..dataset.text_files import MAX_CAPTION_BYTES, read_text
from ..files import write_atomic, write_text_atomic
from .authors import Authors
from .config import Target


@dataclass(frozen=True)
class FolderCaptions:
    """The files of a folder as they are now. `metadata` are the captions in metadata files by image key."""

    files: FolderFiles
    metadata: Mapping[str, list[str]]
    authors: Authors

    @classmethod
    def read(cls, folder: Path) -> FolderCaptions:
        """Raises ValueError for a folder without images, and for notes of authors that are damaged."""
        files = scan_folder(folder)
        arrange(files)
        if not files.images:
            raise ValueError(f"{folder.name!r} has no images: put some into it, such as .png or .jpg files")
        return cls(files, read_metadata(files), Authors.read(files.root))

    @cached_property
    def images(self) -> dict[str, ImageFile]:
        """By key, in order."""
        return {image.key: image for image in self.files.images}

    @cached_property
    def table(self) -> CaptionTable:
        """The folder's metadata.csv, the only metadata file that is written to. Raises as CaptionTable.read."""
        return CaptionTable.read(self.files)

    def caption(self, key: str) -> str | None:
        """The caption of an image as training would read it, None if it has none; kohya's folder names do not count.

        Raises ValueError for a text that cannot be read.
        """
        if key in self.metadata:
            return next((text for text in self.metadata[key] if text.strip()), None)
        texts = (read_text(self.files, name, MAX_CAPTION_BYTES) for name in texts_of(self.files, self.images[key]))
        return next((text for text in texts if text.strip()), None)

    def obstacle(self, key: str, target: Target) -> str | None:
        """Why no caption can be written for an image; None if one can."""
        try:
            if self.goes_into_table(key, target):
                return self.table.refused.get(key)
        except ValueError as error:
            return str(error)
        if key in self.metadata:
            return f"its caption is in a metadata file other than {TABLE} in the folder itself: change it there"
        path = self.text_file(key)
        if not path.resolve().is_relative_to(self.files.root):
            return f"{path.parent.name} is a link out of this folder: remove it"
        if path not in self.files.texts.values() and os.path.lexists(path):
            return f"{path.name} is no text file of this folder, or is a link out of it: remove it"
        return None

    def write(self, captions: Mapping[str, str], by: str, target: Target) -> None:
        """Writes captions by image key, after a note of who wrote them and of what they replace."""
        for key, text in captions.items():
            self.authors.note(key, text, by, self.caption(key))
        in_table = {key: text for key, text in captions.items() if self.goes_into_table(key, target)}
        table = self.table.with_captions(in_table) if in_table else ""
        if captions:
            self.authors.save()
        if in_table:
            write_atomic(self.table.path, lambda file: file.write_text(table, encoding="utf-8", newline=""))
        for key, text in captions.items():
            if key not in in_table:
                write_text_atomic(self.text_file(key), text)

    def text_file(self, key: str) -> Path:
        """The text file that has the caption of an image, or that gets it: in captions/ for one in images/."""
        image = self.images[key]
        if texts := [self.files.texts[name] for name in texts_of(self.files, image)]:
            return next((path for path in texts if path.stat().st_size), texts[0])
        if key.startswith("images/"):
            return self.files.root / f"captions/{image.stem.removeprefix('images/')}.txt"
        return image.path.with_suffix(".txt")

    def goes_into_table(self, key: str, target: Target) -> bool:
        """Whether a caption is, or will be, in metadata.csv. Names that it cannot have get a text file."""
        has_table = any(name.casefold() == TABLE for name in self.files.texts)
        if has_table and (key in self.table.rows_of or key in self.table.refused):
            return True
        return target == "metadata_csv" and key not in self.metadata and self.table.has_room_for(key)
