"""Which training image may have a wrong caption: the losses of all images as CSV, chart and sentences."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..dataset.caption_dataset import CaptionEntry
from ..files import write_atomic, write_text_atomic
from ..images.figures import new_figure
from ..images.fonts import with_families
from .run.loop_state import ImageLosses

CSV, CHART = "image_losses.csv", "image_losses.png"
_OUTLIER = 2.0  # robust standard deviations above the median
_DEVIATION = 1.4826  # median absolute deviations in a standard deviation of normal values
_SHOWN = 20
_NAMED = 3
_PLAIN, _RED, _LINE = "#7f9cc0", "#b3261e", "#333333"


@dataclass(frozen=True)
class ImageLoss:
    """The losses of one image. `ratio`: with its caption by without one, before training: a caption that describes the
    image makes it smaller. `outlier`: far above the others, so that the caption may be wrong."""

    name: str
    caption: str
    captioned: float
    uncaptioned: float
    trained: float | None
    outlier: bool

    @property
    def ratio(self) -> float:
        return self.captioned / self.uncaptioned


def rated_images(entries: Sequence[CaptionEntry], losses: ImageLosses) -> list[ImageLoss]:
    """The images of a run, the highest ratio first."""
    ratios = [a / b for a, b in zip(losses.captioned, losses.uncaptioned, strict=True)]
    median = statistics.median(ratios)
    limit = median + _OUTLIER * _DEVIATION * statistics.median(abs(ratio - median) for ratio in ratios)
    rated = [
        ImageLoss(
            name=entry.image.name,
            caption=entry.caption,
            captioned=losses.captioned[number],
            uncaptioned=losses.uncaptioned[number],
            trained=losses.trained[number] if losses.trained else None,
            outlier=ratio > limit,
        )
        for number, (entry, ratio) in enumerate(zip(entries, ratios, strict=True))
    ]
    return sorted(rated, key=lambda image: -image.ratio)


def captions_to_check(images: Sequence[ImageLoss]) -> list[str]:
    """A line for each outlier, the worst first, at most three."""
    median = statistics.median(image.ratio for image in images)
    outliers = [image for image in images if image.outlier][:_NAMED]
    return [
        f"{image.name}: its caption may be wrong ({image.ratio:.2f} of the loss without a caption, others "
        f"{median:.2f}): {image.caption}"
        for image in outliers
    ]


def write_image_losses(folder: Path, images: Sequence[ImageLoss]) -> None:
    """Writes image_losses.csv and image_losses.png to the run's folder. Raises OSError."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["image", "ratio", "loss", "loss_without_caption", "loss_after_training", "outlier", "caption"])
    for image in images:
        losses = (image.captioned, image.uncaptioned, image.trained)
        rows.writerow([image.name, f"{image.ratio:.6g}", *losses, int(image.outlier), image.caption])
    write_text_atomic(folder / CSV, text.getvalue())
    write_atomic(folder / CHART, lambda path: _plot(path, images[:_SHOWN]))


def _plot(path: Path, images: Sequence[ImageLoss]) -> None:
    figure = new_figure(8, 1.2 + 0.26 * len(images))
    axes = figure.subplots()
    colors = [_RED if image.outlier else _PLAIN for image in images]
    axes.barh(range(len(images)), [image.ratio for image in images], color=colors)
    axes.axvline(1, color=_LINE, linewidth=1)
    names, families = with_families("\n".join(image.name for image in images))
    axes.set_yticks(range(len(images)), names.split("\n"), fontsize=8, fontfamily=families)
    axes.set_ylim(len(images) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title("loss with the caption / without one, before training (1: it does not help)", fontsize=9, loc="left")
    figure.savefig(path, format="png", metadata={"Software": None})
