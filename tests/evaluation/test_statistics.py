"""Paired differences and their intervals, against scipy and against simulations without a difference."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from sdxl_lora_core.evaluation.statistics import (
    Interval,
    bootstrap_interval,
    mean_and_deviation,
    paired_difference,
    t_interval,
)


def null_scores(prompts: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two variants without a difference, as CLIP scores are: prompts differ much, and variants differ by prompt."""
    random = np.random.default_rng(seed)
    prompt = random.normal(25, 4, (prompts, 1))
    first, second = (prompt + random.normal(0, 1, (prompts, 1)) + random.normal(0, 2, (prompts, 4)) for _ in range(2))
    return first, second


@pytest.mark.parametrize("prompts", [8, 16, 32])
def test_of_2000_null_comparisons_five_in_a_hundred_exclude_zero(prompts: int) -> None:
    wrong = sum(paired_null(prompts, seed) for seed in range(2000))
    assert wrong / 2000 == pytest.approx(0.05, abs=0.015)


def paired_null(prompts: int, seed: int) -> bool:
    first, second = null_scores(prompts, seed)
    return t_interval((first - second).mean(1)).excludes_zero


def test_the_interval_is_the_t_interval_over_prompt_means() -> None:
    first, second = null_scores(8, 3)
    found = paired_difference(first, second)
    means = (first - second).mean(1)
    wanted = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    assert (found.interval.low, found.interval.high) == pytest.approx((wanted.low, wanted.high))
    assert found.mean == pytest.approx(means.mean()) and (found.prompts, found.pairs) == (8, 32)
    assert found.wins == pytest.approx((first > second).mean()) and found.bootstrap is None


def test_from_30_prompts_on_there_is_the_bootstrap_interval() -> None:
    first, second = null_scores(30, 1)
    found = paired_difference(first + 1, second)
    wanted = stats.bootstrap(((first + 1 - second).mean(1),), np.mean, rng=np.random.default_rng(0))
    assert found.bootstrap == Interval(wanted.confidence_interval.low, wanted.confidence_interval.high)
    assert found.bootstrap.width == pytest.approx(found.interval.width, rel=0.2)
    assert paired_difference(first[:29], second[:29]).bootstrap is None


def test_equal_scores_have_no_winner_and_a_half_of_the_pairs() -> None:
    scores = np.ones((40, 2))
    found = paired_difference(scores, scores)
    assert (found.mean, found.interval, found.bootstrap, found.wins) == (0, Interval(0, 0), Interval(0, 0), 0.5)
    assert found.verdict == 0
    assert paired_difference(scores + 1, scores).verdict == 1 and paired_difference(scores, scores + 1).verdict == -1


def test_a_single_prompt_has_no_interval_and_no_winner() -> None:
    found = paired_difference(np.array([[3.0, 4.0]]), np.array([[1.0, 5.0]]))
    assert found.mean == 0.5 and math.isnan(found.interval.low) and found.wins == 0.5 and found.verdict == 0
    assert found.interval.as_json() is None and str(found.interval) == "no interval"


def test_pairs_without_a_score_are_left_out() -> None:
    nan = math.nan
    found = paired_difference(np.array([[3.0, nan], [nan, nan], [4.0, 6.0]]), np.array([[1.0, 1], [1, 1], [1, nan]]))
    assert (found.mean, found.prompts, found.pairs) == (2.5, 2, 2)
    nothing = paired_difference(np.array([[nan]]), np.array([[1.0]]))
    assert math.isnan(nothing.mean) and math.isnan(nothing.wins) and nothing.pairs == 0


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shapes \(2, 1\) and \(3, 1\)"):
        paired_difference(np.ones((2, 1)), np.ones((3, 1)))


def test_the_bootstrap_is_the_same_each_time() -> None:
    values = np.random.default_rng(0).normal(size=40)
    assert bootstrap_interval(values) == bootstrap_interval(values)


def test_mean_and_deviation() -> None:
    assert mean_and_deviation(np.array([1.0, 3.0, math.nan])) == pytest.approx((2, math.sqrt(2)))
    assert mean_and_deviation(np.array([5.0])) == (5, 0)
    assert all(map(math.isnan, mean_and_deviation(np.array([math.nan]))))
