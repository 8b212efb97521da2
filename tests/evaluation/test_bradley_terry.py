"""Strengths from votes: closed forms, coverage of the intervals, and the cases without a finite answer."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sdxl_lora_core.evaluation.bradley_terry import connected_groups, fit_strengths


def wins(*pairs: tuple[int, int, float], variants: int = 2, prompt: int = 0, prompts: int = 1) -> np.ndarray:
    counted = np.zeros((prompts, variants, variants))
    for first, second, count in pairs:
        counted[prompt, first, second] += count
    return counted


@pytest.mark.parametrize(("a", "b"), [(3, 1), (10, 7), (1, 1), (0.5, 20), (1000, 1)])
def test_two_variants_have_the_log_of_the_ratio_of_their_wins(a: float, b: float) -> None:
    found = fit_strengths(wins((0, 1, a), (1, 0, b)))
    assert found.difference(0, 1) == pytest.approx(math.log(a / b), abs=1e-6)
    assert found.values.sum() == pytest.approx(0, abs=1e-9) and not found.is_bounded


def test_a_tree_of_pairs_has_the_log_ratio_of_each() -> None:
    """Without a loop of comparisons each ratio is fitted exactly."""
    found = fit_strengths(wins((0, 1, 3), (1, 0, 1), (1, 2, 5), (2, 1, 2), variants=3))
    assert found.difference(0, 1) == pytest.approx(math.log(3), abs=1e-6)
    assert found.difference(1, 2) == pytest.approx(math.log(2.5), abs=1e-6)
    assert found.difference(0, 2) == pytest.approx(math.log(7.5), abs=1e-6)


def test_expected_wins_equal_the_wins_at_the_maximum() -> None:
    """The likelihood's equations, on four variants with a cycle."""
    counts = np.random.default_rng(0).integers(1, 9, (1, 4, 4)).astype(float)
    counts[0][np.diag_indices(4)] = 0
    values = fit_strengths(counts).values
    chances = 1 / (1 + np.exp(values[None] - values[:, None]))
    expected = ((counts[0] + counts[0].T) * chances).sum(1)
    np.testing.assert_allclose(expected, counts[0].sum(1), atol=1e-6)


def test_ties_are_half_a_win_for_each() -> None:
    assert fit_strengths(wins((0, 1, 5 * 0.5), (1, 0, 5 * 0.5))).difference(0, 1) == pytest.approx(0, abs=1e-9)
    assert fit_strengths(wins((0, 1, 3.5), (1, 0, 1.5))).difference(0, 1) == pytest.approx(math.log(7 / 3), abs=1e-6)


def test_a_variant_that_won_everything_has_a_bounded_strength() -> None:
    found = fit_strengths(wins((0, 1, 7)))
    assert found.is_bounded and found.difference(0, 1) == pytest.approx(math.log(7.5 / 0.5), abs=1e-6)
    three = fit_strengths(wins((0, 1, 4), (0, 2, 4), (1, 2, 2), (2, 1, 2), variants=3))
    assert three.is_bounded and three.values.argmax() == 0
    assert three.difference(1, 2) == pytest.approx(0, abs=1e-9)


def test_few_unanimous_votes_are_not_told_apart_and_many_are() -> None:
    def unanimous(prompts: int, votes: int) -> tuple[float, float]:
        counted = np.zeros((prompts, 2, 2))
        counted[:, 0, 1] = votes
        interval = fit_strengths(counted).interval(0, 1)
        return interval.low, interval.high

    assert unanimous(2, 1)[0] < 0 and unanimous(4, 1)[0] < 0
    assert unanimous(12, 3)[0] > 0


def test_votes_on_one_prompt_give_no_interval() -> None:
    found = fit_strengths(wins((0, 1, 30), (1, 0, 3), prompts=4))
    assert found.prompts == 1 and found.interval(0, 1).as_json() is None
    assert not found.interval(0, 1).excludes_zero


def test_prompts_that_agree_by_chance_do_not_tell_variants_apart() -> None:
    for prompts in (2, 3):
        interval = fit_strengths(np.tile([[0.0, 2.0], [1.0, 0.0]], (prompts, 1, 1))).interval(0, 1)
        assert interval.low < 0 < math.log(2) < interval.high and interval.width > 2


def test_variants_that_one_prompt_connects_have_no_interval() -> None:
    both = np.tile(wins((0, 1, 2), (1, 0, 1), variants=3), (3, 1, 1))
    found = fit_strengths(both + wins((1, 2, 3), (2, 1, 2), variants=3, prompt=1, prompts=3))
    assert found.interval(0, 1).as_json() is not None
    for first, second in ((0, 2), (1, 2), (2, 0)):
        assert found.interval(first, second).as_json() is None and not found.interval(first, second).excludes_zero
    assert found.difference(1, 2) == pytest.approx(math.log(1.5), abs=1e-6)


def test_groups_that_were_never_compared_have_no_ranking() -> None:
    apart = wins((0, 1, 2), (1, 0, 1), (2, 3, 1), (3, 2, 1), variants=4)
    assert connected_groups(apart[0]) == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="2 groups of variants"):
        fit_strengths(apart)
    assert connected_groups(wins((0, 1, 1), variants=3)[0]) == [[0, 1], [2]]


def election(draw: np.random.Generator, truth: np.ndarray, prompts: int, votes: int) -> np.ndarray:
    counted = np.zeros((prompts, len(truth), len(truth)))
    for first in range(len(truth)):
        for second in range(first):
            chance = 1 / (1 + math.exp(truth[second] - truth[first]))
            won = draw.binomial(votes, chance, prompts)
            counted[:, first, second], counted[:, second, first] = won, votes - won
    return counted


@pytest.mark.parametrize(
    ("truth", "prompts", "votes"),
    [((0.0, 0.0), 8, 5), ((0.5, -0.5), 12, 4), ((0.6, 0.0, -0.6), 10, 3), ((1.0, 0.2, -0.2, -1.0), 20, 2)],
)
def test_intervals_cover_the_truth_in_95_of_100_elections(truth: tuple[float, ...], prompts: int, votes: int) -> None:
    draw = np.random.default_rng(7)
    values, covered = np.array(truth), 0
    for _ in range(200):
        found = fit_strengths(election(draw, values, prompts, votes))
        interval = found.interval(0, len(values) - 1)
        covered += interval.low <= values[0] - values[-1] <= interval.high
    assert abs(covered / 200 - 0.95) <= 0.04


@pytest.mark.parametrize("prompts", [2, 3, 4])
@pytest.mark.parametrize("truth", [(0.0, 0.0), (0.4, 0.0, -0.4)])
def test_intervals_of_few_prompts_cover_the_truth(truth: tuple[float, ...], prompts: int) -> None:
    draw = np.random.default_rng(11)
    values, elections, covered = np.array(truth), 300, 0
    for _ in range(elections):
        interval = fit_strengths(election(draw, values, prompts, 6)).interval(0, len(values) - 1)
        covered += interval.low <= values[0] - values[-1] <= interval.high
    assert covered / elections >= 0.91


def test_votes_that_agree_within_a_prompt_widen_the_interval() -> None:
    """The same shares of votes, once mixed in each prompt and once all alike: ten prompts are not 100 votes."""
    mixed, alike = np.zeros((10, 2, 2)), np.zeros((10, 2, 2))
    mixed[:, 0, 1], mixed[:, 1, 0] = 6, 4
    alike[:6, 0, 1], alike[6:, 1, 0] = 10, 10
    widths = [fit_strengths(counted).interval(0, 1).width for counted in (mixed, alike)]
    assert widths[1] > 2 * widths[0]
