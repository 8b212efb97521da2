from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from .compare_loras import interval_words
from .host.comfy import nothing
from .host.progress import Progress
from .host.vote_routes import votes_folder
from .previews import Column, show, table
from .widgets import link
from .wires import CATEGORY, stack_entry, to_image

if TYPE_CHECKING:
    from ..sdxl_lora_core.evaluation.ballot import Ballot
    from ..sdxl_lora_core.evaluation.ballot_report import BallotReport
    from ..sdxl_lora_core.evaluation.comparison import Comparison

_NAME_HELP = (
    "The name of the vote, and of its folder in output/votes. The same images are voted on further; for others a "
    "number is appended if the name is taken."
)
_WAIT_HELP = "Waits until there are this many votes. 0: goes on at once, with the ranking so far."
_SECONDS = 0.5  # between two looks at the votes
_COLUMNS: list[Column] = [
    ("name", "variant", None),
    ("won", "won", 2),
    ("strength", "strength", 2),
    ("difference", "to first", 2),
    ("interval", "95 % interval", None),
    ("verdict", "", None),
]


class HumanCompare:
    """Has people vote on the images of a comparison, blind, and ranks the variants."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Shows two variants of the same prompt and seed on a page, without names and on random sides, for people to "
        "choose the better one, also on a phone. Ranks the variants by all votes, with intervals."
    )
    SEARCH_ALIASES = ["vote", "blind test", "ab test", "human evaluation", "elo", "bradley terry", "preference"]
    RETURN_TYPES = ("STRING", "LORA_STACK", "IMAGE", "STRING")
    RETURN_NAMES = ("ranking", "best", "chart", "report")
    OUTPUT_TOOLTIPS = (
        "The ranking in words.",
        "The LoRAs of the variant in first place. Without a ranking, connected nodes do not run.",
        "Strengths with intervals. Without a ranking, connected nodes do not run.",
        "All results in numbers, as JSON.",
    )
    OUTPUT_NODE = True
    FUNCTION = "rank"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "comparison": link("COMPARISON", "The images to vote on, from Compare LoRAs."),
                "save_as": ("STRING", {"default": "vote", "tooltip": _NAME_HELP}),
                "wait_for": ("INT", {"default": 0, "min": 0, "max": 1_000_000, "tooltip": _WAIT_HELP}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, save_as: str | None = None, **inputs: Any) -> float:
        return float("nan")  # votes come in at any time

    def rank(self, comparison: Comparison, save_as: str, wait_for: int) -> dict[str, Any]:
        from ..sdxl_lora_core.evaluation.ballot import make_ballot

        with Progress() as progress:
            ballot = make_ballot(comparison, votes_folder(), save_as, progress.during("writing images"))
            progress.on_run(ballot.folder.name)
            report = _report(ballot)
            while len(report.votes) < wait_for:
                progress(len(report.votes), wait_for, "waiting for votes", page_of(ballot))
                time.sleep(_SECONDS)
                report = _report(ballot)
        return _outputs(report, comparison)


def page_of(ballot: Ballot) -> str:
    """The address of the page on ComfyUI's server."""
    return f"/sdxl_lora/vote/{ballot.folder.name}"


def _report(ballot: Ballot) -> BallotReport:
    from ..sdxl_lora_core.evaluation.ballot import read_votes
    from ..sdxl_lora_core.evaluation.ballot_report import BallotReport

    return BallotReport(ballot, read_votes(ballot))


def _outputs(report: BallotReport, comparison: Comparison) -> dict[str, Any]:
    text, chart, best = "\n".join(report.sentences()), report.chart(), nothing()
    if report.leader is not None:
        best = [stack_entry(lora) for lora in comparison.results[report.leader].variant.loras]
    charts = [] if chart is None else [chart]
    outputs = (text, best, to_image(charts) if charts else nothing(), report.to_json())
    rows = [row | {"interval": interval_words(row.get("interval"))} for row in report.table()]
    vote = [{"name": report.ballot.folder.name, "page": page_of(report.ballot)}]
    return show(outputs, text, charts, table=table(_COLUMNS, rows), vote=vote)
