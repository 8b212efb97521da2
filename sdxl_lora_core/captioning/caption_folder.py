"""Captions the images of a folder, a batch at a time: what is written stays, whatever happens to the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..dataset.caption_text import clean_caption, with_trigger_word
from ..dataset.folder_files import ImageFile, Problem
from ..images.decode import open_image
from .authors import HAND
from .captioner import Captioner
from .config import CaptionConfig
from .folder_captions import FolderCaptions

OnImages = Callable[[int, int], object]

_NAMED = 20  # problems in words


@dataclass
class CaptionReport:
    """What became of each image: `captions` by image key as they are now, `authors` of them, and `problems`.

    `order` are the keys of all images; `written` of those that were written now, `kept` of those that had a caption
    before.
    """

    order: list[str] = field(default_factory=list)
    captions: dict[str, str] = field(default_factory=dict)
    authors: dict[str, str] = field(default_factory=dict)
    written: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def add(self, key: str, text: str, author: str, kind: list[str]) -> None:
        """`kind` is `written` or `kept`."""
        self.captions[key], self.authors[key] = clean_caption(text), author
        kind.append(key)

    def sentences(self) -> list[str]:
        """What was done, in words."""
        by_hand = sum(self.authors[key] == HAND for key in self.kept)
        lines = [f"{len(self.written)} captions written, {len(self.kept)} kept, {by_hand} of them written by hand."]
        if self.problems:
            lines.append(f"{len(self.problems)} images without a new caption:")
            lines += [f"{problem.file}: {problem.reason}" for problem in self.problems[:_NAMED]]
        if len(self.problems) > _NAMED:
            lines.append(f"and {len(self.problems) - _NAMED} more, in the report")
        return lines

    def as_json(self) -> dict[str, Any]:
        written = set(self.written)
        images = [
            {"file": key, "caption": text, "by": self.authors[key], "written": key in written}
            for key, text in ((key, self.captions[key]) for key in self.order if key in self.captions)
        ]
        return {"images": images, "problems": [{"file": one.file, "reason": one.reason} for one in self.problems]}


def caption_folder(
    folder: Path,
    captioner: Captioner,
    config: CaptionConfig,
    on_images: OnImages = lambda done, total: None,
) -> CaptionReport:
    """Writes captions for the images in `folder` that need one, by `config.existing`.

    Captions are written a batch at a time, each file as a whole, after a note of who wrote them (see Authors). One that
    was written by someone else meanwhile is kept. `on_images(done, total)` is called before the first batch and after
    each, and may raise to cancel. Raises ValueError for a folder without images, for notes that are damaged and for a
    captioner that cannot be used; OSError if the folder cannot be written to.
    """
    files = FolderCaptions.read(folder)
    report = CaptionReport(order=list(files.images))
    seen = _images_to_caption(files, config, report)
    if seen:
        captioner.open()
    on_images(0, len(seen))
    keys = list(seen)
    for start in range(0, len(keys), config.batch_size):
        batch = keys[start : start + config.batch_size]
        found = _new_captions([files.images[key] for key in batch], captioner, report)
        new = {key: compose(text, config, files.images[key].is_regularisation) for key, text in found.items()}
        _write(folder, new, captioner.name, config, seen, report)
        on_images(start + len(batch), len(keys))
    return report


def compose(caption: str, config: CaptionConfig, is_regularisation: bool = False) -> str:
    """The caption with prefix and suffix and, in front of all, the trigger word if it is not in it.

    Regularisation images have no trigger word: they show what it is not.
    """
    parts = [clean_caption(part).strip(" ,") for part in (config.prefix, caption, config.suffix)]
    whole = ", ".join(part for part in parts if part)
    return whole if is_regularisation else with_trigger_word(whole, config.trigger_word)


def _images_to_caption(files: FolderCaptions, config: CaptionConfig, report: CaptionReport) -> dict[str, str | None]:
    """The captions that are to be replaced by image key, None where there is none. The report gets all others."""
    seen: dict[str, str | None] = {}
    claimed: dict[str, str] = {}
    for key in files.images:
        try:
            text = files.caption(key)
        except ValueError as error:
            report.problems.append(Problem(key, str(error)))
            continue
        author = HAND if text is None else files.authors.author(key, text)
        replaces = config.existing == "replace_all" or (config.existing == "replace_generated" and author != HAND)
        if text is not None and not replaces:
            report.add(key, text, author, report.kept)
            continue
        obstacle = files.obstacle(key, config.write_to)
        if not obstacle and not files.goes_into_table(key, config.write_to):
            obstacle = _shares_file(files, key, claimed)
        if obstacle:
            report.problems.append(Problem(key, obstacle))
            if text is not None:
                report.add(key, text, author, report.kept)
        else:
            seen[key] = text
    return seen


def _shares_file(files: FolderCaptions, key: str, claimed: dict[str, str]) -> str | None:
    """Why an image cannot have a text file of its own: another image with the same name but for its suffix has it."""
    path = files.text_file(key)
    other = claimed.setdefault(str(path).casefold(), key)
    return None if other == key else f"it shares {path.name} with {other}: rename one of them"


def _new_captions(images: Sequence[ImageFile], captioner: Captioner, report: CaptionReport) -> dict[str, str]:
    """The captions of those images that can be read and that get one, by key."""
    readable: dict[str, np.ndarray] = {}
    for image in images:
        try:
            readable[image.key] = np.asarray(open_image(image.path))
        except (OSError, ValueError) as error:
            report.problems.append(Problem(image.key, str(error)))
    found = captioner.captions(list(readable), list(readable.values())) if readable else []
    new = {key: clean_caption(text) for key, text in zip(readable, found, strict=True)}
    for key, text in new.items():
        if not text:
            report.problems.append(Problem(key, f"{captioner.name} gave no caption: write one by hand"))
    return {key: text for key, text in new.items() if text}


def _write(
    folder: Path,
    new: Mapping[str, str],
    by: str,
    config: CaptionConfig,
    seen: Mapping[str, str | None],
    report: CaptionReport,
) -> None:
    """Writes the captions of a batch, but not over one that was changed since it was `seen`."""
    now = FolderCaptions.read(folder)
    found = {key: now.caption(key) for key in new if key in now.images}
    changed = {key: text for key, text in found.items() if text is not None and text != seen[key]}
    now.write({key: new[key] for key in found if key not in changed}, by, config.write_to)
    for key in found:
        if key in changed:
            report.add(key, changed[key], now.authors.author(key, changed[key]), report.kept)
        else:
            report.add(key, new[key], by, report.written)
