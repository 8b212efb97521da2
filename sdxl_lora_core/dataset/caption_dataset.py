"""Loads a folder of captioned images as training data: what is used, what is skipped and why, and how it is cropped."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageChops

from ..files import file_sha256, json_sha256
from ..images.crop import Crop, center_crop, crop_to_bucket, random_crop
from ..images.decode import decode_mask, decode_with_alpha, strict_pillow
from ..messages import shown
from .buckets import bucket_for, is_added_square
from .caption_text import clean_caption, with_trigger_word
from .captions import ImageCaptions, read_captions
from .config import DatasetConfig
from .folder_files import FolderFiles, ImageFile, Problem, scan_folder
from .layout import arrange

_FINGERPRINT_VERSION = 1
# Converting an image of 64 megapixels takes up to 1 GB, so there is a limit instead of one thread per core.
_DECODERS = 4


@dataclass(frozen=True)
class CaptionEntry:
    """One image. `width` and `height` in px after EXIF rotation; `captions` include the trigger word.

    `mask` is the mask's file, or the image itself if it has an alpha channel; None to train on the whole image.
    `mask_has_alpha`: the mask's file has transparent parts, which count as black.
    `written`: the captions without the trigger word, empty if that alone is the caption; `caption_file` has them, or
    None for captions of metadata files and folder names.
    """

    image: Path
    captions: tuple[str, ...]
    width: int
    height: int
    sha256: str
    repeats: int
    flip: bool
    resolution: int
    random_crops: int = 0
    mask: Path | None = None
    mask_sha256: str = ""
    mask_has_alpha: bool = False
    written: tuple[str, ...] = ()
    caption_file: Path | None = None

    @property
    def caption(self) -> str:
        """The first caption: used in reports, sheets and for the validation loss."""
        return self.captions[0]

    @property
    def bucket(self) -> tuple[int, int]:
        return bucket_for(self.width, self.height, self.resolution)

    @property
    def center(self) -> Crop:
        return center_crop(self.width, self.height, self.bucket)

    @property
    def crops(self) -> tuple[Crop, ...]:
        """The crops that training chooses from: the center, or `random_crops` crops seeded by the image's content."""
        if not self.random_crops:
            return (self.center,)
        numbers = range(self.random_crops)
        return tuple(random_crop(self.width, self.height, self.bucket, self.sha256, number) for number in numbers)


@dataclass(frozen=True)
class CaptionDataset:
    """Images to train on (`entries`), for validation and for regularisation, and the files with problems.

    The fingerprint covers what training depends on: file contents, captions and settings in order, but no paths or
    times. `sources` are the folders with their settings, in order: loading them again gives the same dataset.
    `validation_sources` are those of the datasets added by `with_validation`. `caption_files` are the texts and
    metadata files that were read; `ignored_files` is the number of hidden and system files. Every file of a folder is
    in one of these, is an image or mask of an entry, or has a problem that says why it is skipped.
    """

    entries: tuple[CaptionEntry, ...]
    validation: tuple[CaptionEntry, ...]
    fingerprint: str
    problems: tuple[Problem, ...]
    trigger_words: tuple[str, ...]
    name: str
    sources: tuple[tuple[Path, DatasetConfig], ...] = ()
    validation_sources: tuple[tuple[Path, DatasetConfig], ...] = ()
    regularisation: tuple[CaptionEntry, ...] = ()
    caption_files: tuple[Path, ...] = ()
    ignored_files: int = 0


def load_caption_dataset(
    folder: Path, config: DatasetConfig, chained: CaptionDataset | None = None, hash_memo: Path | None = None
) -> CaptionDataset:
    """Decodes every image in `folder` once to check it, and pairs it with its captions (layouts: see read_captions).

    The entries of `chained` come first in the result, so that concepts can be trained together; each keeps its own
    settings. With a trigger word, that is the caption of images without one. `hash_memo` is a folder that stores file
    hashes. Raises FileNotFoundError if the folder does not exist, ValueError with the reasons if none of its images can
    be used.
    """
    if not folder.exists():
        raise FileNotFoundError(f"the dataset folder {folder.name!r} does not exist")
    if not folder.is_dir():
        raise ValueError(f"{folder.name!r} is a file: give the folder with the images and captions")
    files = scan_folder(folder)
    found = len(files.images)
    arrange(files)
    entries = _read_entries(files, config, hash_memo)
    problems = [replace(p, file=f"{folder.name}/{p.file}".rstrip("/")) for p in dict.fromkeys(files.problems)]
    if not entries:
        raise ValueError(_nothing_left(folder.name, found, problems))
    loaded = _loaded(folder, config, entries, files)
    return _joined(chained, replace(loaded, problems=tuple(problems)))


def with_validation(dataset: CaptionDataset, held_out: CaptionDataset) -> CaptionDataset:
    """Adds all images of `held_out` to the validation images of `dataset`.

    Raises ValueError if one of them is trained on: its loss would not show how well the LoRA generalises.
    """
    trained = {entry.sha256 for entry in dataset.entries}
    images = held_out.entries + held_out.validation
    if shared := [entry.image.name for entry in images if entry.sha256 in trained]:
        raise ValueError(
            f"{len(shared)} images of the validation dataset are also trained on, such as {shared[0]}: "
            "remove them from one of the two datasets"
        )
    return replace(
        dataset,
        validation=dataset.validation + images,
        validation_sources=held_out.sources + held_out.validation_sources,
    )


def _read_entries(
    files: FolderFiles, config: DatasetConfig, hash_memo: Path | None
) -> list[tuple[ImageFile, CaptionEntry]]:
    captions = read_captions(files, config.caption_per_line, config.trigger_word)
    usable = [image for image in files.images if image.key in captions]

    def read(image: ImageFile) -> tuple[CaptionEntry | None, list[Problem]]:
        return _read_entry(files, image, captions[image.key], config, hash_memo)

    with strict_pillow(), ThreadPoolExecutor(_DECODERS) as pool:
        results = list(pool.map(read, usable))
    files.problems += [problem for _, problems in results for problem in problems]
    entries = [(image, entry) for image, (entry, _) in zip(usable, results, strict=True) if entry]
    if alone := sum(not entry.written for _, entry in entries):
        files.problems.append(_captioned_by(clean_caption(config.trigger_word), alone))
    return entries


def _captioned_by(word: str, count: int) -> Problem:
    have, their = ("images have", "their") if count > 1 else ("image has", "its")
    return Problem("", f"{count} {have} no caption file: the trigger word {shown(word)} is {their} caption", False)


def _read_entry(
    files: FolderFiles, image: ImageFile, captions: ImageCaptions, config: DatasetConfig, hash_memo: Path | None
) -> tuple[CaptionEntry | None, list[Problem]]:
    """The entry of an image, None if it cannot be used, and the problems of the image and its mask."""
    try:
        pixels, alpha = decode_with_alpha(image.path)
        digest = file_sha256(image.path, hash_memo)
    except (ValueError, OSError) as error:
        return None, [Problem(image.key, str(error))]
    trigger = "" if image.is_regularisation else config.trigger_word
    trained = tuple(with_trigger_word(text, trigger) for text in captions.texts) or (clean_caption(trigger),)
    settings = (config.repeats * image.repeats, config.flip, config.resolution, config.random_crops)
    entry = CaptionEntry(image.path, trained, pixels.width, pixels.height, digest, *settings)
    entry = replace(entry, written=captions.texts, caption_file=captions.file)
    if mask := files.masks.get(image.stem):
        entry, problem = _with_mask(entry, mask, hash_memo)
        return entry, [Problem(mask.relative_to(files.root).as_posix(), *problem)] if problem else []
    if alpha is None:
        return entry, []
    if _is_black(alpha, entry):
        return None, [Problem(image.key, "is fully transparent where it is cropped, so nothing would be trained")]
    return replace(entry, mask=image.path), []


def _with_mask(entry: CaptionEntry, mask: Path, hash_memo: Path | None) -> tuple[CaptionEntry, tuple[str, bool] | None]:
    """The entry with a mask that can be used, and the mask's problem (reason, whether it is skipped), if it has one."""
    try:
        painted, has_alpha = decode_mask(mask)
        digest = file_sha256(mask, hash_memo)
    except (ValueError, OSError) as error:
        return entry, (str(error), True)
    if _is_black(painted, entry):
        reason = "is all black where it is cropped, so nothing would be trained: paint the part to train on white"
        return entry, (reason, True)
    masked = replace(entry, mask=mask, mask_sha256=digest, mask_has_alpha=has_alpha)
    if _is_black(ImageChops.invert(painted), entry):
        return masked, ("is all white where it is cropped, so it has no effect", False)
    return masked, None


def _is_black(mask: Image.Image, entry: CaptionEntry) -> bool:
    """Whether a mask (mode L) is black in every crop of the image."""
    return all(crop_to_bucket(mask, crop).getextrema()[1] == 0 for crop in entry.crops)


def _loaded(
    folder: Path, config: DatasetConfig, entries: Sequence[tuple[ImageFile, CaptionEntry]], files: FolderFiles
) -> CaptionDataset:
    """The dataset of one folder."""
    regularisation = [entry for image, entry in entries if image.is_regularisation or config.is_regularisation]
    others = [entry for image, entry in entries if not (image.is_regularisation or config.is_regularisation)]
    training, validation = _split(others, config.validation_percent)
    words = [word] if (word := clean_caption(config.trigger_word)) else []
    skipped = {problem.file for problem in files.problems if problem.skipped}
    return CaptionDataset(
        entries=tuple(training),
        validation=tuple(validation),
        fingerprint="",
        problems=(),
        trigger_words=tuple(words),
        name=folder.name,
        sources=((folder, config),),
        regularisation=tuple(regularisation),
        caption_files=tuple(path for name, path in files.texts.items() if name not in skipped),
        ignored_files=files.ignored,
    )


def _joined(chained: CaptionDataset | None, loaded: CaptionDataset) -> CaptionDataset:
    """`chained` followed by `loaded`, with their fingerprint."""
    parts = [part for part in (chained, loaded) if part]
    words = tuple(dict.fromkeys(word for part in parts for word in part.trigger_words))
    training, validation, regularisation = (
        tuple(entry for part in parts for entry in getattr(part, kind))
        for kind in ("entries", "validation", "regularisation")
    )
    return CaptionDataset(
        entries=training,
        validation=validation,
        fingerprint=_fingerprint(training, validation, regularisation, words),
        problems=tuple(problem for part in parts for problem in part.problems),
        trigger_words=words,
        name=" + ".join(part.name for part in parts),
        sources=tuple(source for part in parts for source in part.sources),
        validation_sources=tuple(source for part in parts for source in part.validation_sources),
        regularisation=regularisation,
        caption_files=tuple(path for part in parts for path in part.caption_files),
        ignored_files=sum(part.ignored_files for part in parts),
    )


def _split(entries: Sequence[CaptionEntry], percent: int) -> tuple[list[CaptionEntry], list[CaptionEntry]]:
    """Splits into training and validation by content hash: copies of an image stay together, and adding images moves
    few others. Each side has at least one image if there are two."""
    contents = sorted({entry.sha256 for entry in entries}, key=lambda sha256: json_sha256(["validation", sha256]))
    count = min(max(1, round(len(contents) * percent / 100)), len(contents) - 1) if percent else 0
    held_out = set(contents[:count])
    training = [entry for entry in entries if entry.sha256 not in held_out]
    return training, [entry for entry in entries if entry.sha256 in held_out]


def _fingerprint(
    training: Sequence[CaptionEntry],
    validation: Sequence[CaptionEntry],
    regularisation: Sequence[CaptionEntry],
    trigger_words: Sequence[str],
) -> str:
    parts = [[_identity(entry) for entry in part] for part in (training, validation)]
    more = [[_identity(entry) for entry in regularisation]] if regularisation else []
    return json_sha256([_FINGERPRINT_VERSION, *parts, list(trigger_words), *more])


def _identity(entry: CaptionEntry) -> list[object]:
    """The part of the fingerprint for an image. Optional properties are added only if set, to keep old fingerprints."""
    captions = entry.caption if len(entry.captions) == 1 else list(entry.captions)
    square = is_added_square(entry.bucket, entry.resolution)
    extras = {"random_crops": entry.random_crops, "mask": entry.mask_sha256, "square_bucket": square}
    extras["mask_has_alpha"] = entry.mask_has_alpha
    more = {name: value for name, value in extras.items() if value}
    return [entry.sha256, captions, entry.repeats, entry.flip, entry.resolution, *([more] if more else [])]


def _nothing_left(name: str, found: int, problems: Sequence[Problem]) -> str:
    if not found:
        return f"the dataset folder {name!r} contains no images: put images with captions into it"
    files: dict[str, list[str]] = {}
    for problem in problems:
        files.setdefault(problem.reason, []).append(problem.file)
    reasons = [f"{names[0]}{_others(len(names) - 1)} {reason}" for reason, names in files.items()]
    more = f"; and {len(reasons) - 5} more reasons" if len(reasons) > 5 else ""
    if any(reason.startswith("has no caption") for reason in files):
        more += ". A trigger_word would be the caption of those without one"
    return (
        f"none of the {image_count(found)} in the dataset folder {name!r} can be used: {'; '.join(reasons[:5])}{more}"
    )


def _others(count: int) -> str:
    return f" and {count} others" if count > 1 else " and 1 other" if count else ""


def image_count(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"
