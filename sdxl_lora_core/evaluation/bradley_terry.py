"""Strengths of variants from pairwise votes.

Bradley and Terry, "Rank analysis of incomplete block designs", 1952: variant i wins over j with probability
1 / (1 + exp(s_j - s_i)). A tie counts as half a win for each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .statistics import CONFIDENCE, Interval

_STEPS, _LARGEST_STEP, _EXACT = 200, 2.0, 1e-12
_NEGLIGIBLE = 1e-10  # of an eigenvalue, relative to the largest
_HALF_A_WIN = 0.5


@dataclass(frozen=True)
class Strengths:
    """The strengths [V] of variants, with mean 0, and two standard errors [V, V] of their differences.

    `errors` are those of the jackknife over prompts, NaN where votes on a single prompt connect two variants;
    `model_errors` would be right if all votes were independent. `prompts` is the number of prompts with votes.
    `is_bounded`: some variants lost or won every comparison with the others, for which no finite strength fits best, so
    that half a win was added in both directions for each pair that was compared.
    """

    values: np.ndarray
    errors: np.ndarray
    model_errors: np.ndarray
    prompts: int
    is_bounded: bool

    def difference(self, first: int, second: int) -> float:
        return float(self.values[first] - self.values[second])

    def interval(self, first: int, second: int) -> Interval:
        """The interval of a difference: by the jackknife, with Student's t of prompts - 1 degrees of freedom.

        Votes on one prompt are alike, so they say little of other prompts. Few prompts may agree by chance: the
        interval is at least as wide as that of independent votes.
        """
        if self.prompts < 2 or math.isnan(self.errors[first, second]):
            return Interval()
        from scipy.stats import norm, t

        share = (1 + CONFIDENCE) / 2
        by_prompts = t.ppf(share, self.prompts - 1) * self.errors[first, second]
        half = max(by_prompts, norm.ppf(share) * self.model_errors[first, second])
        value = self.difference(first, second)
        return Interval(float(value - half), float(value + half))


def fit_strengths(wins: np.ndarray) -> Strengths:
    """Fits wins [prompts, V, V], where wins[p, i, j] counts how often i won over j on prompt p, ties as 0.5 for both.

    Jackknife: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 11. Raises ValueError if the votes
    do not connect all variants, see `connected_groups`.
    """
    by_prompt = wins[wins.sum((1, 2)) > 0]
    total = wins.sum(0)
    if len(groups := connected_groups(total)) > 1:
        raise ValueError(f"the votes compare {len(groups)} groups of variants within themselves only")
    values, is_bounded = _fit(total)
    model = np.sqrt(_model_variance(_with_half_wins(total) if is_bounded else total, values))
    return Strengths(values, _jackknife(total, by_prompt), model, len(by_prompt), is_bounded)


def _jackknife(total: np.ndarray, by_prompt: np.ndarray) -> np.ndarray:
    """The standard errors [V, V] of differences, leaving out each prompt; NaN where that disconnects two variants."""
    if len(by_prompt) < 2:
        return np.full(total.shape, math.nan)
    left_out = np.stack([_fit(total - own)[0] for own in by_prompt])
    spread = left_out[:, :, None] - left_out[:, None, :]
    count = len(by_prompt)
    errors = np.sqrt((count - 1) / count * ((spread - spread.mean(0)) ** 2).sum(0))
    for own in by_prompt:
        groups = connected_groups(total - own)
        for group in groups if len(groups) > 1 else []:
            others = [variant for variant in range(len(total)) if variant not in group]
            errors[np.ix_(group, others)] = math.nan
    return errors


def connected_groups(wins: np.ndarray) -> list[list[int]]:
    """The variants in groups that votes connect, directly or through others, by wins [V, V]."""
    return _components(wins + wins.T, "weak")


def _components(wins: np.ndarray, connection: str) -> list[list[int]]:
    from scipy.sparse.csgraph import connected_components

    _, labels = connected_components(wins > 0, directed=True, connection=connection)
    return [np.flatnonzero(labels == label).tolist() for label in dict.fromkeys(labels.tolist())]


def _fit(wins: np.ndarray) -> tuple[np.ndarray, bool]:
    """Newton's method on the log likelihood, which is concave. The second value is Strengths.is_bounded."""
    is_bounded = len(_components(wins, "strong")) > 1
    wins = _with_half_wins(wins) if is_bounded else wins
    strengths = np.zeros(len(wins))
    for _ in range(_STEPS):
        gradient = (wins - (wins + wins.T) * _chances(strengths)).sum(1)
        step = np.clip(_inverse(_information(wins, strengths)) @ gradient, -_LARGEST_STEP, _LARGEST_STEP)
        strengths = strengths + step - step.mean()
        if np.abs(step).max() < _EXACT:
            break
    return strengths - strengths.mean(), is_bounded


def _with_half_wins(wins: np.ndarray) -> np.ndarray:
    return wins + _HALF_A_WIN * ((wins + wins.T) > 0)


def _chances(strengths: np.ndarray) -> np.ndarray:
    """The probability that row wins over column."""
    return 1 / (1 + np.exp(strengths[None, :] - strengths[:, None]))


def _information(wins: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    """The negative Hessian of the log likelihood."""
    chances = _chances(strengths)
    weights = (wins + wins.T) * chances * (1 - chances)
    return np.diag(weights.sum(1)) - weights


def _inverse(information: np.ndarray) -> np.ndarray:
    """The pseudoinverse: a constant added to all strengths changes nothing."""
    return np.linalg.pinv(information, rcond=_NEGLIGIBLE, hermitian=True)


def _model_variance(wins: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    """The variance [V, V] of the differences if all votes were independent."""
    covariance = _inverse(_information(wins, strengths))
    own = np.diag(covariance)
    return np.maximum(own[:, None] + own[None, :] - 2 * covariance, 0)
