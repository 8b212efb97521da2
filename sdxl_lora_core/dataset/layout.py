"""The layout of a dataset folder: kohya's folders of repeats, or a folder images/, decide which images are used."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from .folder_files import FolderFiles, ImageFile, Problem

MAX_REPEATS = 1000
_NAME = re.compile(r"(\d+)_(.+)")
_IMAGES, _TRAINING, _REGULARISATION = "images/", "img/", "reg/"


class KohyaFolder(NamedTuple):
    """A folder named REPEATS_NAME, and the folder that contains it: empty or ending in a slash."""

    container: str
    repeats: int
    name: str


def arrange(files: FolderFiles) -> None:
    """Moves images that the layout does not use to `left_out`, with a problem each, and gives the others their repeats.

    If kohya folders (such as 10_cat) contain images, only those images are used. They may be in the dataset folder, in
    images/ or, as in the projects of kohya's tools, in img/ and, for regularisation, reg/. In any other folder all
    images are used, except those outside images/ if there is such a folder.
    """
    containers = _containers(files.images)
    if not containers:
        has_folder = any(image.key.startswith(_IMAGES) for image in files.images)
        arranged = [image if image.key.startswith(_IMAGES) or not has_folder else None for image in files.images]
        reasons = ["is outside images/: move it there to use it"] * len(arranged)
    else:
        arranged = [_in_kohya_folder(image, containers) for image in files.images]
        reasons = [_why_left_out(image.key) for image in files.images]
    for image, used, reason in zip(files.images, arranged, reasons, strict=True):
        if used is None:
            files.left_out.append(image)
            files.problems.append(Problem(image.key, reason))
    files.images = [image for image in arranged if image]


def kohya_folder(key: str) -> KohyaFolder | None:
    """The folder of an image if it is named as kohya's are."""
    *above, folder, _ = ["", *key.split("/")]
    if not (found := _NAME.fullmatch(folder)):
        return None
    return KohyaFolder("".join(f"{name}/" for name in above if name), int(found[1]), found[2])


def _containers(images: Sequence[ImageFile]) -> Mapping[str, bool]:
    """The folders that contain kohya folders, and whether these are for regularisation; empty for other layouts."""
    folders = [folder for image in images if (folder := kohya_folder(image.key))]
    found = {folder.container for folder in folders if 1 <= folder.repeats <= MAX_REPEATS}
    if _TRAINING in found:
        return {_TRAINING: False, _REGULARISATION: True}
    return {container: False for container in ("", _IMAGES) if container in found}


def _in_kohya_folder(image: ImageFile, containers: Mapping[str, bool]) -> ImageFile | None:
    folder = kohya_folder(image.key)
    if folder is None or folder.container not in containers or not 1 <= folder.repeats <= MAX_REPEATS:
        return None
    is_regularisation = containers[folder.container]
    return replace(image, repeats=folder.repeats, folder_caption=folder.name, is_regularisation=is_regularisation)


def _why_left_out(key: str) -> str:
    *above, parent = ["", *key.split("/")[:-1]]
    folder = kohya_folder(key)
    if folder and not 1 <= folder.repeats <= MAX_REPEATS:
        return f"is in {parent}, which stands for {folder.repeats} repeats: use 1 to {MAX_REPEATS}"
    if inside := next((name for name in above if _NAME.fullmatch(name)), None):
        return f"is in a subfolder of {inside}: move it to {inside} to use it"
    return "is outside the folders with repeats, such as 10_cat: move it to one of them to use it"
