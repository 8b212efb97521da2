"""Reads the captions of each image: from metadata files, text files beside the images, or kohya's folder names."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..messages import shown
from .caption_text import clean_caption
from .folder_files import CAPTION_SUFFIXES, METADATA_NAMES, FolderFiles, ImageFile, Problem, scan_folder
from .layout import arrange
from .metadata_files import read_metadata
from .text_files import MAX_CAPTION_BYTES, read_text


@dataclass(frozen=True)
class ImageCaptions:
    """The captions of an image as written, empty if the trigger word is its caption. `file` is their text file."""

    texts: tuple[str, ...]
    file: Path | None = None


def read_captions(files: FolderFiles, per_line: bool = False, trigger_word: str = "") -> dict[str, ImageCaptions]:
    """The captions by image key. Images without a caption and texts without an image are added to `files.problems`.

    The first source that has a caption for an image is used: a metadata.csv or metadata.jsonl (see read_metadata);
    captions/<name>.txt or .caption for images/<name>; a .txt or .caption beside the image; the name of its kohya
    folder. A list in metadata.jsonl gives an image several captions, and with `per_line` so does each line of a text.
    An image that none of them has a caption for is used if there is a `trigger_word`.
    """
    written = {key: _split(texts, per_line) for key, texts in read_metadata(files).items()}
    captions = {key: ImageCaptions(texts) for key, texts in written.items() if texts}
    claimed: dict[str, str] = {}
    used: set[str] = set()
    for image in [*files.left_out, *files.images]:
        texts = list(texts_of(files, image))
        claimed |= dict.fromkeys(texts, image.key)
        if image.key in written or image in files.left_out:
            continue
        try:
            if found := _beside(files, texts, used, per_line) or _of_folder(files, image):
                captions[image.key] = found
            elif clean_caption(trigger_word) and not image.is_regularisation:
                captions[image.key] = ImageCaptions(())
            else:
                raise ValueError(f"has no caption: write one to {image.stem}.txt")
        except ValueError as error:
            files.problems.append(Problem(image.key, str(error), no_caption=True))
    for key in [key for key, texts in written.items() if not texts]:
        files.problems.append(Problem(key, "its caption is empty: describe what the image shows", no_caption=True))
    _report_unused(files, {name: claimed.get(name) for name in files.texts if name not in used}, captions)
    return captions


def caption_file(root: Path, key: str) -> Path:
    """The text file in the dataset folder `root` that has the caption of the image `key`, or that may get it.

    Raises FileNotFoundError if there is no such image, ValueError if its caption is in a metadata file, or if something
    else has the name of the text file.
    """
    files = scan_folder(root)
    arrange(files)
    image = next((image for image in files.images if image.key == key), None)
    if image is None:
        raise FileNotFoundError(f"{shown(key)} is no image of the dataset {root.name!r}: run the node again")
    if key in read_metadata(files):
        raise ValueError(f"the caption of {key} is in a metadata file ({' or '.join(METADATA_NAMES)}): change it there")
    texts = [files.texts[name] for name in texts_of(files, image)]
    if texts:
        return next((path for path in texts if path.stat().st_size), texts[0])
    path = image.path.with_suffix(".txt")
    if os.path.lexists(path):
        raise ValueError(f"{path.name} is no text file of this folder, or is a link out of it: remove it")
    return path


def texts_of(files: FolderFiles, image: ImageFile) -> Iterator[str]:
    """The keys of the texts that may have an image's caption, in order.

    Upper and lower case differ only if two texts differ so.
    """
    stems = [image.stem]
    if image.key.startswith("images/"):
        stems.insert(0, f"captions/{image.stem.removeprefix('images/')}")
    for name in (stem + suffix for stem in stems for suffix in CAPTION_SUFFIXES):
        if name in files.texts:
            yield name
        elif len(alike := files.texts_by_folded_name.get(name.casefold(), ())) == 1:
            yield alike[0]


def _split(texts: list[str], per_line: bool) -> tuple[str, ...]:
    lines = [line for text in texts for line in (text.splitlines() if per_line else [text])]
    return tuple(caption for line in lines if (caption := clean_caption(line)))


def _beside(files: FolderFiles, texts: Sequence[str], used: set[str], per_line: bool) -> ImageCaptions | None:
    """The captions in the first of an image's texts that is not empty; `used` receives its name."""
    for name in texts:
        if found := _split([read_text(files, name, MAX_CAPTION_BYTES)], per_line):
            used.add(name)
            return ImageCaptions(found, files.texts[name])
    if texts:
        raise ValueError(f"its caption {texts[0]} is empty: describe what the image shows")
    return None


def _of_folder(files: FolderFiles, image: ImageFile) -> ImageCaptions | None:
    caption = clean_caption(image.folder_caption)
    if not caption:
        return None
    files.problems.append(
        Problem(image.key, f"has no caption: the name of its folder is used, {shown(caption)}", skipped=False)
    )
    return ImageCaptions((caption,))


def _report_unused(files: FolderFiles, unused: Mapping[str, str | None], captions: Collection[str]) -> None:
    """`unused` are texts, each with the image it belongs to by name; those of images without captions are not named."""
    for name, image in unused.items():
        if name.rpartition("/")[2].lower() in METADATA_NAMES:
            continue
        if image is None:
            reason = "is the caption of no image: give it the name of one, with .txt in place of the image's suffix"
            files.problems.append(Problem(name, reason))
        elif image in captions:
            files.problems.append(Problem(name, f"is not used: it is empty, or {image} has another caption"))
