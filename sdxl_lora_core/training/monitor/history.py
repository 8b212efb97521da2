"""What a run's folder tells about the run, for pages that show it: losses, samples, checkpoints and the report."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .metrics import COLUMNS

_SHOWN = ("step", "loss", "smoothed", "learning_rate", "validation_loss")
_FINAL = re.compile(r"\d{2,}\.png")  # of the finished LoRA; those of a step begin with `step-`


def run_history(folder: Path) -> dict[str, Any]:
    """The run of a folder as JSON values; what does not exist yet is empty.

    `points` has a row for each step: step, loss, moving average of the loss, learning rate, validation loss. `samples`
    are images of the subfolder `samples` with their step (None for those of the finished LoRA), prompt and CLIP score.
    """
    report = _report(folder)
    return {
        "name": folder.name,
        "finished": (folder / "finished").exists(),
        "points": list(_points(folder / "metrics.csv")),
        "samples": [*_samples_of_steps(folder / "samples"), *_final_samples(folder / "samples")],
        "checkpoints": sorted(
            int(path.name[5:]) for path in folder.glob("checkpoints/step-*") if path.name[5:].isdigit()
        ),
        "report": report,
    }


def runs_of(runs: Path, name: str) -> list[str]:
    """The runs of a series, such as `cat`, `cat_00001` and so on: the newest first."""
    series = re.compile(rf"{re.escape(name)}(_\d{{5}})?")
    if not runs.is_dir():
        return []
    found = [path for path in runs.iterdir() if series.fullmatch(path.name) and (path / "identity").exists()]
    return [path.name for path in sorted(found, key=lambda path: (path / "identity").stat().st_mtime, reverse=True)]


def _points(file: Path) -> Iterator[list[float | None]]:
    columns = [COLUMNS.index(name) for name in _SHOWN]
    for row in _rows(file):
        if len(row) == len(COLUMNS):
            values = [_number(row[column]) for column in columns]
            if values[0] is not None:
                yield values


def _samples_of_steps(folder: Path) -> Iterator[dict[str, Any]]:
    for row in _rows(folder / "samples.csv"):
        if len(row) == 5 and (step := _number(row[0])) is not None and (folder / row[1]).exists():
            yield {"step": int(step), "image": row[1], "prompt": row[3], "clip_score": _number(row[4])}


def _final_samples(folder: Path) -> Iterator[dict[str, Any]]:
    names = sorted(path.name for path in folder.glob("*.png") if _FINAL.fullmatch(path.name))
    for name in names:
        yield {"step": None, "image": name, "prompt": None, "clip_score": None}


def _rows(file: Path) -> list[list[str]]:
    """Without the names of the columns. The training may be writing the last row at this moment."""
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            return list(csv.reader(opened))[1:]
    except (OSError, UnicodeDecodeError, csv.Error):
        return []


def _number(text: str) -> float | None:
    """None where there is none, and for infinity and NaN, which JSON does not have."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) < float("inf") else None


def _report(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
