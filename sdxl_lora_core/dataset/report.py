"""A sheet and a list of a dataset's images, and a report of what is used and what is skipped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..images.decode import open_image
from ..images.sheets import CELL, fit, sheet
from .caption_dataset import CaptionDataset, CaptionEntry, image_count
from .captions import read_captions
from .folder_files import Problem, scan_folder
from .layout import arrange


def contact_sheet(dataset: CaptionDataset, limit: int = 24) -> Image.Image:
    """Up to `limit` images with their captions, spread evenly over the dataset."""
    entries = [*dataset.entries, *dataset.validation, *dataset.regularisation]
    shown = [entries[number * len(entries) // limit] for number in range(limit)] if len(entries) > limit else entries
    marks = dict.fromkeys(dataset.validation, "(validation) ") | dict.fromkeys(dataset.regularisation, "(prior) ")
    cells = [(fit(open_image(entry.image), CELL), marks.get(entry, "") + entry.caption) for entry in shown]
    more = f" and {len(entries) - len(shown)} more, not shown" if len(entries) > len(shown) else ""
    return sheet(cells, f"{dataset.name}: {len(shown)} images{more}")


def describe(dataset: CaptionDataset, limit: int = 40) -> str:
    """The report: first what is wrong, then counts, buckets, trigger words, and images that are enlarged or cropped.

    At most `limit` files of a kind are named.
    """
    resolutions = sorted({entry.resolution for entry in dataset.entries})
    lines = [
        *_titled("skipped", _problem_lines(dataset.problems, skipped=True), limit),
        *_titled("used, but check", _problem_lines(dataset.problems, skipped=False), limit),
        _sentence(dataset),
        f"trigger words: {', '.join(dataset.trigger_words) or 'none'}",
        f"resolution: {', '.join(map(str, resolutions))}",
        *_extras(dataset),
        *_bucket_table(dataset.entries),
        *_enlarged(dataset.entries, limit),
        *_mostly_cropped(dataset.entries, limit),
        f"fingerprint: {dataset.fingerprint[:16]}",
    ]
    return "\n".join(lines)


def listing(folder: Path, trigger_word: str = "", limit: int = 60) -> dict[str, Any]:
    """The images of a folder as JSON values, for a page on which captions are edited. No image is decoded.

    `entries` are the first `limit` of `total` images: name (relative path), caption (one a line, as written, without
    the trigger word), whether training uses it (it has a caption, or is given the trigger word), and a version that
    changes with the file. `unused` is the number of images that are not used. `problems` are lines about all other
    files that are skipped, `notes` about files that are used.
    """
    files = scan_folder(folder)
    arrange(files)
    captions = read_captions(files, per_line=True, trigger_word=trigger_word)
    entries = [
        {
            "name": image.key,
            "caption": "\n".join(captions[image.key].texts) if image.key in captions else "",
            "used": image.key in captions,
            "version": str(image.path.stat().st_mtime_ns),
        }
        for image in files.images[:limit]
    ]
    problems = [replace(found, file=f"{folder.name}/{found.file}") for found in dict.fromkeys(files.problems)]
    return {
        "entries": entries,
        "total": len(files.images),
        "unused": sum(image.key not in captions for image in files.images),
        **_lines(problems, limit),
    }


def checked(dataset: CaptionDataset, limit: int = 60) -> dict[str, list[str]]:
    """`problems` and `notes` as in `listing`, of all folders of a dataset, with those that only decoding finds."""
    return _lines(dataset.problems, limit)


def _lines(problems: Sequence[Problem], limit: int) -> dict[str, list[str]]:
    """Without images that have no caption: the page shows those among the others."""
    others = [problem for problem in problems if not problem.no_caption]
    return {
        "problems": _cut(_problem_lines(others, skipped=True), limit),
        "notes": _cut(_problem_lines(others, skipped=False), limit),
    }


def _sentence(dataset: CaptionDataset) -> str:
    count, per_epoch = len(dataset.entries), sum(entry.repeats for entry in dataset.entries)
    repeated = f", {per_epoch} in an epoch with repeats" if per_epoch != count else ""
    folders = " and ".join(str(folder) for folder, _ in dataset.sources)
    return f"{image_count(count)} to train on{repeated}, from {folders}"


def _extras(dataset: CaptionDataset) -> list[str]:
    """Lines for features that only some datasets use."""
    entries = dataset.entries
    repeats = Counter(entry.repeats for entry in entries)
    counts = {
        "validation": image_count(len(dataset.validation)) if dataset.validation else "",
        "flip": sum(entry.flip for entry in entries),
        "repeats": ", ".join(f"{image_count(repeats[n])} x {n}" for n in sorted(repeats)) if len(repeats) > 1 else "",
        "random crops": sum(entry.random_crops for entry in entries),
        "captions": sum(len(entry.captions) for entry in entries) if any(len(e.captions) > 1 for e in entries) else 0,
        "masks (used with masked_loss)": sum(entry.mask is not None for entry in entries),
        "regularisation images": len(dataset.regularisation),
        "hidden and system files, ignored": dataset.ignored_files,
    }
    return [f"{name}: {count}" for name, count in counts.items() if count]


def _bucket_table(entries: Sequence[CaptionEntry]) -> list[str]:
    images = Counter(entry.bucket for entry in entries)
    per_epoch: Counter[tuple[int, int]] = Counter()
    for entry in entries:
        per_epoch[entry.bucket] += entry.repeats
    rows = [f"  {w:>5} x {h:<5} {images[w, h]:>6} {per_epoch[w, h]:>10}" for w, h in sorted(images)]
    return ["buckets:", f"  {'width x height':<13} {'images':>6} {'per epoch':>9}", *rows]


def _enlarged(entries: Sequence[CaptionEntry], limit: int) -> list[str]:
    lines = []
    for entry in entries:
        crop = entry.center
        if crop.resized_w > entry.width or crop.resized_h > entry.height:
            bucket = f"{crop.bucket_w}x{crop.bucket_h}"
            lines.append(f"{entry.image.name}: {entry.width}x{entry.height}, trained at {bucket}")
    return _titled("smaller than their bucket, so enlarged (soft; a lower resolution avoids it)", lines, limit)


def _mostly_cropped(entries: Sequence[CaptionEntry], limit: int) -> list[str]:
    lines = []
    for entry in entries:
        crop = entry.center
        share = crop.bucket_w * crop.bucket_h / (crop.resized_w * crop.resized_h)
        if share < 0.5:
            bucket = f"{crop.bucket_w}x{crop.bucket_h}"
            lines.append(f"{entry.image.name}: {entry.width}x{entry.height}, {share:.0%} of it is trained, at {bucket}")
    return _titled("mostly cropped away, because no bucket is as long (crop them yourself)", lines, limit)


def _problem_lines(problems: Sequence[Problem], skipped: bool) -> list[str]:
    return [f"{problem.file}: {problem.reason}" for problem in problems if problem.skipped == skipped]


def _titled(title: str, lines: Sequence[str], limit: int) -> list[str]:
    return [f"{title}: {len(lines)}", *(f"  {line}" for line in _cut(lines, limit))] if lines else []


def _cut(lines: Sequence[str], limit: int) -> list[str]:
    more = [f"... and {len(lines) - limit} more"] if len(lines) > limit else []
    return [*lines[:limit], *more]
