"""The audit of a dataset as one HTML file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ..dataset.audit import DatasetAudit
from ..dataset.audit_checks import Finding, Item
from ..files import write_atomic, write_text_atomic
from ..images.decode import open_image
from .html_report import embedded_jpeg, embedded_png, render
from .saving import claimed_folder, png_writer

_MOST = 24  # items of a kind on the page; report.json has all
_SIDE = 256


def dataset_page(audit: DatasetAudit, chart: np.ndarray) -> str:
    """Findings with thumbnails, charts and tags; everything is embedded."""
    return render(
        "dataset.html",
        audit=audit,
        chart=embedded_png(chart),
        sections=[_section(finding) for finding in audit.findings],
    )


def save_audit(audit: DatasetAudit, chart: np.ndarray, root: Path, name: str) -> Path:
    """Writes report.html, report.json and chart.png to the next free folder `root/name`; returns the page.

    Raises ValueError for a name that is no file name, OSError if the folder cannot be written to.
    """
    folder = claimed_folder(root, name)
    write_text_atomic(folder / "report.html", dataset_page(audit, chart))
    write_text_atomic(folder / "report.json", json.dumps(audit.as_json(), ensure_ascii=False, indent=1))
    write_atomic(folder / "chart.png", png_writer(chart))
    return folder / "report.html"


def _section(finding: Finding) -> dict[str, object]:
    items = [{"text": item.text, "sources": _thumbnails(item)} for item in finding.items[:_MOST]]
    more = len(finding.items) - len(items)
    return {"finding": finding, "entries": items, "more": more, "pictures": any(item.images for item in finding.items)}


def _thumbnails(item: Item) -> list[str]:
    return [embedded_jpeg(np.asarray(open_image(path)), _SIDE) for path in item.images]
