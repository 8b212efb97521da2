"""The result of a vote: a ranking in words, as a table, as JSON and as a chart."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..images.figures import new_figure, pixels_of
from ..images.fonts import with_families
from .ballot import Ballot, Vote, totals
from .bradley_terry import Strengths, connected_groups, fit_strengths

_BETTER, _WORSE, _UNKNOWN = "#2e7d32", "#b3261e", "#8a8a8a"
_NAMED = 4  # variants in a sentence


@dataclass(frozen=True)
class BallotReport:
    """The ranking by the votes so far."""

    ballot: Ballot
    votes: Sequence[Vote]

    @cached_property
    def wins(self) -> np.ndarray:
        """[prompts, V, V]: how often row won over column on a prompt; a tie is half a win for both."""
        prompts = {prompt: number for number, prompt in enumerate(self.ballot.prompts)}
        variants = {name: number for number, name in enumerate(self.ballot.variants)}
        wins = np.zeros((len(prompts), len(variants), len(variants)))
        for vote in self.votes:
            prompt, left, right = prompts[vote.prompt], variants[vote.left], variants[vote.right]
            share = {"left": 1.0, "right": 0.0, "tie": 0.5}[vote.choice]
            wins[prompt, left, right] += share
            wins[prompt, right, left] += 1 - share
        return wins

    @cached_property
    def groups(self) -> list[list[int]]:
        """The variants in groups that were compared with each other, directly or through others."""
        return connected_groups(self.wins.sum(0))

    @cached_property
    def strengths(self) -> Strengths | None:
        """None as long as the votes do not connect all variants: there is no ranking of all then."""
        return fit_strengths(self.wins) if len(self.groups) == 1 else None

    @cached_property
    def order(self) -> list[int]:
        """The variants, the strongest first; in the order of the comparison without a ranking."""
        numbers = range(len(self.ballot.variants))
        if self.strengths is None:
            return list(numbers)
        values = self.strengths.values
        return sorted(numbers, key=lambda number: -values[number])

    @property
    def leader(self) -> int | None:
        return None if self.strengths is None else self.order[0]

    def verdict(self, first: int, second: int) -> int:
        """1 if the first is better, -1 if the second is, 0 if the interval does not tell."""
        if self.strengths is None or not self.strengths.interval(first, second).excludes_zero:
            return 0
        return 1 if self.strengths.difference(first, second) > 0 else -1

    def sentences(self) -> list[str]:
        """The ranking in words, or what is missing for one."""
        by_rater = totals(self.votes)
        lines = [f"{len(self.votes)} votes by {len(by_rater)} raters; {len(self.ballot.pairs)} pairs for each rater."]
        if not self.votes:
            return [*lines, "Open the page to vote."]
        if self.strengths is None:
            first, second = (self.ballot.variants[group[0]] for group in self.groups[:2])
            return [*lines, f"No ranking yet: {first} and {second} were not compared, directly or through others."]
        lines.append(self._verdict(self.strengths))
        if np.isnan(self.strengths.errors).any():
            lines.append("Votes on a single prompt give no interval: vote on several to know.")
        if self.strengths.is_bounded:
            lines.append("Some variants won or lost every comparison: their strength is at least what is shown.")
        return lines

    def _verdict(self, strengths: Strengths) -> str:
        names, (leader, *others) = self.ballot.variants, self.order
        close = [names[other] for other in others if self.verdict(leader, other) != 1]
        if not close:
            second = others[0]
            chance = 1 / (1 + math.exp(-strengths.difference(leader, second)))
            return f"{names[leader]} is the best: it wins over {names[second]} in {chance:.0%} of comparisons."
        named = ", ".join(close[:_NAMED]) + (f" and {len(close) - _NAMED} more" if len(close) > _NAMED else "")
        return f"{names[leader]} is ahead, but not distinguishable from {named}: more votes would tell."

    def table(self) -> list[dict[str, Any]]:
        """For each variant, the strongest first: its strength, difference to the first variant, and share won."""
        total = self.wins.sum(0)
        rows = []
        for number in self.order:
            won, compared = total[number].sum(), total[number].sum() + total[:, number].sum()
            row: dict[str, Any] = {"name": self.ballot.variants[number], "compared": int(compared)}
            row["won"] = round(float(won / compared), 4) if compared else None
            row["strength"] = None if self.strengths is None else round(float(self.strengths.values[number]), 4)
            if number and self.strengths is not None:
                row["difference"] = round(self.strengths.difference(number, 0), 4)
                row["interval"] = self.strengths.interval(number, 0).as_json()
                row["verdict"] = ("worse", "not distinguishable", "better")[self.verdict(number, 0) + 1]
            rows.append(row)
        return rows

    def as_json(self) -> dict[str, Any]:
        ties = sum(vote.choice == "tie" for vote in self.votes)
        return {
            "vote": self.ballot.folder.name,
            "baseline": self.ballot.variants[0],
            "sentences": self.sentences(),
            "votes": len(self.votes),
            "raters": dict(totals(self.votes)),
            "ties": ties,
            "pairs": len(self.ballot.pairs),
            "ranking": self.table(),
            "differences": [] if self.strengths is None else self._differences(self.strengths),
        }

    def to_json(self) -> str:
        return json.dumps(self.as_json(), ensure_ascii=False, indent=1, allow_nan=False)

    def chart(self) -> np.ndarray | None:
        """uint8 [H, W, 3]: the differences in strength to the first variant with 95 % intervals; None without."""
        if self.strengths is None:
            return None
        figure = new_figure(8, 1.0 + 0.36 * len(self.order))
        axes = figure.subplots()
        axes.axvline(0, color="#333333", linewidth=1)
        for place, number in enumerate(self.order):
            value, interval = self.strengths.difference(number, 0), self.strengths.interval(number, 0)
            color = (_WORSE, _UNKNOWN, _BETTER)[self.verdict(number, 0) + 1]
            if number and interval.as_json():
                axes.plot([interval.low, interval.high], [place, place], color=color, linewidth=2)
            axes.plot(value, place, "o", color=color, markersize=6)
        names, families = with_families("\n".join(self.ballot.variants[number] for number in self.order))
        axes.set_yticks(range(len(self.order)), names.split("\n"), fontsize=9, fontfamily=families)
        axes.set_ylim(len(self.order) - 0.5, -0.5)
        axes.grid(alpha=0.25)
        axes.set_title("strength by votes (log-odds over the first variant), 95 % interval", fontsize=9, loc="left")
        return pixels_of(figure)

    def _differences(self, strengths: Strengths) -> list[dict[str, Any]]:
        names = self.ballot.variants
        return [
            {
                "first": names[first],
                "second": names[second],
                "difference": round(strengths.difference(first, second), 6),
                "interval": strengths.interval(first, second).as_json(),
            }
            for first in range(len(names))
            for second in range(first)
        ]
