"""A sheet of a dataset's images and a report of what is used and what is skipped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from PIL import Image

from ..images.decode import open_image
from ..images.sheets import CELL, fit, sheet
from .caption_dataset import CaptionDataset, CaptionEntry, image_count
from .folder_files import Problem


def contact_sheet(dataset: CaptionDataset, limit: int = 24) -> Image.Image:
    """Up to `limit` images with their captions, spread evenly over the dataset."""
    entries = [*dataset.entries, *dataset.validation, *dataset.regularisation]
    shown = [entries[number * len(entries) // limit] for number in range(limit)] if len(entries) > limit else entries
    marks = dict.fromkeys(dataset.validation, "(validation) ") | dict.fromkeys(dataset.regularisation, "(prior) ")
    cells = [(fit(open_image(entry.image), CELL), marks.get(entry, "") + entry.caption) for entry in shown]
    more = f" and {len(entries) - len(shown)} more, not shown" if len(entries) > len(shown) else ""
    return sheet(cells, f"{dataset.name}: {len(shown)} images{more}")


def describe(dataset: CaptionDataset, limit: int = 40) -> str:
    """The report: counts, buckets, trigger words, images that are enlarged or skipped (at most `limit` names each)."""
    per_epoch = sum(entry.repeats for entry in dataset.entries)
    resolutions = sorted({entry.resolution for entry in dataset.entries})
    lines = [
        f"{dataset.name}: {image_count(len(dataset.entries))} to train on, {per_epoch} per epoch with repeats",
        f"validation: {image_count(len(dataset.validation))}",
        f"trigger words: {', '.join(dataset.trigger_words) or 'none'}",
        f"resolution: {', '.join(map(str, resolutions))}",
        f"flip: {sum(entry.flip for entry in dataset.entries)} of {len(dataset.entries)}",
        *_extras(dataset),
        *_bucket_table(dataset.entries),
        *_enlarged(dataset.entries, limit),
        *_mostly_cropped(dataset.entries, limit),
        *_problem_lines("skipped", [problem for problem in dataset.problems if problem.skipped], limit),
        *_problem_lines("used, but check", [problem for problem in dataset.problems if not problem.skipped], limit),
        f"fingerprint: {dataset.fingerprint[:16]}",
    ]
    return "\n".join(lines)


def _extras(dataset: CaptionDataset) -> list[str]:
    """Lines for features that only some datasets use."""
    entries = dataset.entries
    repeats = Counter(entry.repeats for entry in entries)
    counts = {
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
            lines.append(f"  {entry.image.name}: {entry.width}x{entry.height}, trained at {bucket}")
    return _titled("smaller than their bucket, so enlarged (soft; a lower resolution avoids it)", lines, limit)


def _mostly_cropped(entries: Sequence[CaptionEntry], limit: int) -> list[str]:
    lines = []
    for entry in entries:
        crop = entry.center
        share = crop.bucket_w * crop.bucket_h / (crop.resized_w * crop.resized_h)
        if share < 0.5:
            bucket = f"{crop.bucket_w}x{crop.bucket_h}"
            lines.append(
                f"  {entry.image.name}: {entry.width}x{entry.height}, {share:.0%} of it is trained, at {bucket}"
            )
    return _titled("mostly cropped away, because no bucket is as long (crop them yourself)", lines, limit)


def _problem_lines(title: str, problems: Sequence[Problem], limit: int) -> list[str]:
    return _titled(title, [f"  {problem.file}: {problem.reason}" for problem in problems], limit)


def _titled(title: str, lines: Sequence[str], limit: int) -> list[str]:
    if not lines:
        return []
    more = [f"  ... and {len(lines) - limit} more"] if len(lines) > limit else []
    return [f"{title}: {len(lines)}", *lines[:limit], *more]
