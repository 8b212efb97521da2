"""A comparison in words and tables: text, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import Any

from ..lora.stack import LoRARef
from .clip_score import rounded
from .comparison import Comparison, Result
from .statistics import mean_and_deviation

_NAMED = 4  # variants in a sentence


def sentences(comparison: Comparison) -> list[str]:
    """For each metric which variant is the best, or which ones the intervals do not tell apart."""
    found = [_verdict(comparison, metric) for metric in comparison.titles]
    if len(comparison.prompts) < 2 and comparison.titles:
        found.append("A single prompt gives no interval: give several prompts, one per line, to know.")
    return [*found, *comparison.notes]


def table_rows(comparison: Comparison, metric: str) -> list[dict[str, Any]]:
    """For each variant mean, standard deviation and paired difference to the baseline, as JSON values."""
    rows = []
    for index, result in enumerate(comparison.results):
        mean, deviation = mean_and_deviation(result.scores[metric])
        row: dict[str, Any] = {"name": result.variant.name, "mean": rounded(mean), "deviation": rounded(deviation)}
        if index:
            row |= _difference(comparison, metric, index, 0)
        rows.append(row)
    return rows


def to_json(comparison: Comparison) -> str:
    """Everything about a comparison but its pixels."""
    return json.dumps(as_json(comparison), ensure_ascii=False, indent=1, allow_nan=False)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The same as JSON values."""
    return {
        "prompts": list(comparison.prompts),
        "seeds": list(comparison.seeds),
        "baseline": comparison.results[0].variant.name,
        "sentences": sentences(comparison),
        "variants": [_variant(result) for result in comparison.results],
        "metrics": {metric: _metric(comparison, metric) for metric in comparison.titles},
    }


def to_csv(comparison: Comparison) -> str:
    """A row for each image: its variant, prompt, seed, key and scores."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "row", "column", "prompt", "seed", "key", *comparison.titles])
    for result in comparison.results:
        scores = [result.scores[metric].ravel() for metric in comparison.titles]
        for number, cell in enumerate(result.cells):
            if cell is None:
                continue
            values = [rounded(float(score[number])) for score in scores]
            variant = result.variant
            writer.writerow([variant.name, variant.row, variant.column, cell.prompt, cell.seed, cell.key, *values])
    return text.getvalue()


def _verdict(comparison: Comparison, metric: str) -> str:
    leader, title = comparison.leader(metric), comparison.titles[metric]
    if leader is None:
        return f"{title}: no image has a score."
    name = comparison.results[leader].variant.name
    mean = f"{comparison.mean(metric, leader):.2f}"
    if comparison.winner(metric) is not None:
        nearest = max(
            (i for i in range(len(comparison.results)) if i != leader), default=None, key=_by(comparison, metric)
        )
        over = "" if nearest is None else f", {_over(comparison, metric, leader, nearest)}"
        return f"{title}: {name} is the best with {mean}{over}."
    close = [comparison.results[index].variant.name for index in comparison.undecided(metric)]
    named = ", ".join(close[:_NAMED]) + (f" and {len(close) - _NAMED} more" if len(close) > _NAMED else "")
    return f"{title}: {name} has the highest mean, {mean}, but is not told apart from {named}: more prompts would."


def _by(comparison: Comparison, metric: str) -> Any:
    def key(index: int) -> float:
        mean = comparison.mean(metric, index)
        return mean if math.isfinite(mean) else -math.inf

    return key


def _over(comparison: Comparison, metric: str, first: int, second: int) -> str:
    found = comparison.difference(metric, first, second)
    return f"{found.mean:+.2f} ({found.interval}) over {comparison.results[second].variant.name}"


def _difference(comparison: Comparison, metric: str, first: int, second: int) -> dict[str, Any]:
    found = comparison.difference(metric, first, second)
    return {
        "difference": rounded(found.mean),
        "interval": found.interval.as_json(),
        "bootstrap": found.bootstrap.as_json() if found.bootstrap else None,
        "wins": rounded(found.wins),
        "pairs": found.pairs,
        "verdict": ("worse", "not told apart", "better")[found.verdict + 1],
    }


def _metric(comparison: Comparison, metric: str) -> dict[str, Any]:
    names = [result.variant.name for result in comparison.results]
    winner = comparison.winner(metric)
    return {
        "title": comparison.titles[metric],
        "winner": None if winner is None else names[winner],
        "table": table_rows(comparison, metric),
        "pairs": [
            {"first": names[first], "second": names[second], **_difference(comparison, metric, first, second)}
            for first in range(len(names))
            for second in range(first)
        ],
    }


def _variant(result: Result) -> dict[str, Any]:
    variant = result.variant
    cells = [
        {"prompt": cell.prompt, "seed": cell.seed, "key": cell.key or None, "from_cache": cell.hit}
        | {metric: rounded(float(scores.ravel()[number])) for metric, scores in result.scores.items()}
        for number, cell in enumerate(result.cells)
        if cell
    ]
    return {
        "name": variant.name,
        "row": variant.row,
        "column": variant.column,
        **({"base": variant.base.name} if variant.base else {}),
        "loras": [_lora(lora) for lora in variant.loras],
        "settings": dict(variant.settings),
        "given": variant.given is not None,
        "images": cells,
    }


def _lora(lora: LoRARef) -> dict[str, Any]:
    blocks = {"blocks": lora.blocks} if lora.blocks.strip() else {}
    return {"name": lora.name, "strength_model": lora.strength_model, "strength_clip": lora.strength_clip} | blocks
