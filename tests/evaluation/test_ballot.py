"""A folder to vote in: what is shown to whom, votes that survive, and the ranking."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_lora_core.evaluation import ballot as ballot_file
from sdxl_lora_core.evaluation.ballot import (
    Ballot,
    Choice,
    append_vote,
    make_ballot,
    read_ballot,
    read_votes,
    require_choice,
    require_rater,
    unvoted,
)
from sdxl_lora_core.evaluation.ballot_report import BallotReport
from sdxl_lora_core.evaluation.comparison import Cell, Comparison, Result
from sdxl_lora_core.evaluation.variants import Variant

NAMES = ("base", "good", "bad")


def plain(grey: int) -> np.ndarray:
    return np.full((8, 8, 3), grey, dtype=np.uint8)


def comparison(names: tuple[str, ...] = NAMES, prompts: int = 4, seeds: int = 2, shade: int = 0) -> Comparison:
    texts = tuple(f"prompt {number}" for number in range(prompts))
    results = []
    for place, name in enumerate(names):
        cells = tuple(
            Cell(
                np.full((8, 8, 3), 40 * place + 3 * number + shade, dtype=np.uint8),
                texts[number // seeds],
                number % seeds,
            )
            for number in range(prompts * seeds)
        )
        results.append(Result(Variant(name), cells, {}))
    return Comparison(texts, tuple(range(seeds)), tuple(results), {})


@pytest.fixture
def ballot(tmp_path: Path) -> Ballot:
    return make_ballot(comparison(), tmp_path, "vote")


def vote(ballot: Ballot, rater: str, number: int, choice: Choice) -> None:
    append_vote(ballot, ballot.vote(rater, ballot.pairs_for(rater)[number], choice))


def elect(ballot: Ballot, rater: str, better: dict[str, int], count: int | None = None) -> None:
    """Votes for the variant with the higher number, a tie if both have the same."""
    for number, pair in enumerate(ballot.pairs_for(rater)[:count]):
        left, right = (better[ballot.variants[side]] for side in (pair.left, pair.right))
        vote(ballot, rater, number, "tie" if left == right else "left" if left > right else "right")


def test_every_pair_of_variants_at_every_prompt_and_seed_once(ballot: Ballot) -> None:
    pairs = ballot.pairs_for("ann")
    assert len(pairs) == 3 * 8
    assert Counter(pair.cell for pair in pairs) == dict.fromkeys(range(8), 3)
    assert {(pair.cell, frozenset((pair.left, pair.right))) for pair in pairs} == {
        (cell, frozenset(sides)) for cell in range(8) for sides in ((0, 1), (0, 2), (1, 2))
    }


def test_order_and_sides_are_random_and_each_raters_own(ballot: Ballot) -> None:
    ann, bob = ballot.pairs_for("ann"), ballot.pairs_for("bob")
    assert ann == ballot.pairs_for("ann") and ann != bob
    assert sorted(pair.cell for pair in ann) != [pair.cell for pair in ann]
    raters = [ballot.pairs_for(f"rater {number}") for number in range(40)]
    on_the_left = Counter(
        ballot.variants[min(pair.left, pair.right)] for pairs in raters for pair in pairs if pair.left < pair.right
    )
    assert all(0.4 < on_the_left[name] / (40 * 8 * others) < 0.6 for name, others in (("base", 2), ("good", 1)))


def test_names_of_images_do_not_tell_the_variant(tmp_path: Path, ballot: Ballot) -> None:
    other = make_ballot(comparison(), tmp_path / "other", "vote")
    names = [name for own in ballot.images for name in own if name]
    assert len(set(names)) == 24 and all(len(name) == 32 for name in names)
    assert not set(names) & {name for own in other.images for name in own}
    found = Image.open(ballot.image(names[9]))
    assert np.asarray(found)[0, 0, 0] == 40 + 3 and not found.info
    for hostile in ("", "..", "../ballot.json", "/etc/passwd", names[0][:-1], "ballot", f"{names[0]}.png"):
        with pytest.raises(FileNotFoundError, match="there is no image"):
            ballot.image(hostile)


def test_the_same_images_are_the_same_ballot_and_others_get_the_next_name(tmp_path: Path, ballot: Ballot) -> None:
    vote(ballot, "ann", 0, "left")
    again = make_ballot(comparison(), tmp_path, "vote")
    assert again == ballot and len(read_votes(again)) == 1
    other = make_ballot(comparison(shade=1), tmp_path, "vote")
    assert other.folder.name == "vote_00002" and not read_votes(other)
    assert make_ballot(comparison(shade=1), tmp_path, "vote") == other
    assert read_ballot(tmp_path, "vote") == ballot


def test_writing_images_is_counted_and_can_be_cancelled(tmp_path: Path) -> None:
    def cancel(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_ballot(comparison(), tmp_path, "vote", cancel)
    images = tmp_path / "vote/images"
    assert len(list(images.iterdir())) == 5 and not (tmp_path / "vote/ballot.json").exists()
    seen: list[tuple[int, int]] = []
    ballot = make_ballot(comparison(), tmp_path, "vote", lambda *counts: seen.append(counts))
    assert ballot.folder.name == "vote" and seen == [(done, 24) for done in range(24)]
    assert {path.stem for path in images.iterdir()} == {name for own in ballot.images for name in own}
    make_ballot(comparison(), tmp_path, "vote", lambda *counts: pytest.fail("the images are there"))


def test_what_cannot_be_voted_on_is_said(tmp_path: Path, ballot: Ballot) -> None:
    with pytest.raises(ValueError, match="a single variant: compare at least two"):
        make_ballot(comparison(("base",)), tmp_path, "one")
    with pytest.raises(ValueError, match="save_as is '../x'"):
        make_ballot(comparison(), tmp_path, "../x")
    for name in ("gone", "vote/images"):
        with pytest.raises((FileNotFoundError, ValueError)):
            read_ballot(tmp_path, name)
    (tmp_path / "vote/ballot.json").write_text("{}")
    with pytest.raises(ValueError, match="ballot.json is damaged: run Human Compare with another save_as"):
        read_ballot(tmp_path, "vote")


def test_images_that_a_search_did_not_make_are_left_out(tmp_path: Path) -> None:
    whole = comparison()
    partly = Result(whole.results[2].variant, (None, *whole.results[2].cells[1:]), {})
    ballot = make_ballot(Comparison(whole.prompts, whole.seeds, (*whole.results[:2], partly), {}), tmp_path, "vote")
    assert len(ballot.pairs) == 3 * 8 - 2 and ballot.images[2][0] is None
    nothing = Result(whole.results[1].variant, (None,) * 8, {})
    with pytest.raises(ValueError, match="no two variants have an image of the same prompt and seed"):
        make_ballot(Comparison(whole.prompts, whole.seeds, (whole.results[0], nothing), {}), tmp_path, "none")


def test_a_vote_is_one_line_that_says_what_was_chosen(ballot: Ballot) -> None:
    vote(ballot, "änn", 3, "right")
    pair = ballot.pairs_for("änn")[3]
    (line,) = (ballot.folder / "votes.jsonl").read_text("utf-8").splitlines()
    found = json.loads(line)
    assert found.pop("time")
    assert found == {
        "rater": "änn", "prompt": f"prompt {pair.cell // 2}", "seed": pair.cell % 2,
        "left": NAMES[pair.left], "right": NAMES[pair.right], "choice": "right",
    }  # fmt: skip


def test_the_last_vote_of_a_rater_on_a_pair_counts(ballot: Ballot) -> None:
    for choice in ("left", "tie", "right"):
        vote(ballot, "ann", 0, choice)
    vote(ballot, "bob", 0, "left")
    votes = read_votes(ballot)
    assert [(one.rater, one.choice) for one in votes] == [("ann", "right"), ("bob", "left")]
    assert unvoted(ballot, "ann", votes) == list(range(1, 24)) and len(unvoted(ballot, "carl", votes)) == 24


def test_a_vote_that_was_cut_off_takes_no_other_with_it(ballot: Ballot) -> None:
    vote(ballot, "ann", 0, "left")
    file = ballot.folder / "votes.jsonl"
    file.write_bytes(file.read_bytes() + b'{"rater": "ann", "prom')
    assert len(read_votes(ballot)) == 1
    vote(ballot, "ann", 1, "left")
    assert len(read_votes(ballot)) == 2
    others = (
        '{"rater": "a", "prompt": "prompt 0", "seed": 0, "left": "x", "right": "base", "choice": "left"}\n[1]\n\xff\n'
    )
    file.write_bytes(file.read_bytes() + others.encode("latin-1"))
    assert len(read_votes(ballot)) == 2


def test_votes_from_many_threads_are_all_there(ballot: Ballot) -> None:
    threads = [
        threading.Thread(target=elect, args=(ballot, f"r{n}", {"base": 1, "good": 2, "bad": 0})) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_votes(ballot)) == 4 * 24
    assert len((ballot.folder / "votes.jsonl").read_text().splitlines()) == 4 * 24


def test_a_full_disk_is_an_error_and_earlier_votes_stay(ballot: Ballot, monkeypatch: pytest.MonkeyPatch) -> None:
    vote(ballot, "ann", 0, "left")

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(ballot_file, "flush_to_disk", full)
        vote(ballot, "ann", 1, "left")
    assert len(read_votes(ballot)) >= 1


# The ranking


def report(ballot: Ballot) -> BallotReport:
    return BallotReport(ballot, read_votes(ballot))


def test_ranking_of_clear_votes(tmp_path: Path) -> None:
    ballot = make_ballot(comparison(prompts=12, seeds=1), tmp_path, "clear")
    for rater in ("ann", "bob", "carl"):
        elect(ballot, rater, {"base": 1, "good": 2, "bad": 0})
    vote(ballot, "dora", 0, "tie")
    found = report(ballot)
    assert [row["name"] for row in found.table()] == ["good", "base", "bad"]
    assert found.leader == 1 and found.verdict(1, 0) == 1 and found.verdict(2, 0) == -1
    assert found.sentences()[1].startswith("good is the best: it wins over base in 9")
    values = found.as_json()
    assert values["votes"] == 3 * 36 + 1 and values["ties"] == 1 and values["raters"]["ann"] == 36
    assert values["ranking"][0]["verdict"] == "better" and values["ranking"][2]["verdict"] == "worse"
    assert json.loads(found.to_json()) == json.loads(json.dumps(values))
    chart = found.chart()
    assert chart is not None and chart.dtype == np.uint8 and chart.std() > 5


def test_equal_variants_are_not_distinguishable(ballot: Ballot) -> None:
    elect(ballot, "ann", {"base": 1, "good": 1, "bad": 0})
    sentence = report(ballot).sentences()[1]
    assert "is ahead, but not distinguishable from" in sentence and ("good" in sentence and "base" in sentence)
    assert report(ballot).table()[0].get("verdict", "not distinguishable") == "not distinguishable"


def test_no_ranking_before_the_votes_connect_all(ballot: Ballot) -> None:
    assert report(ballot).sentences() == ["0 votes by 0 raters; 24 pairs for each rater.", "Open the page to vote."]
    assert report(ballot).chart() is None and report(ballot).leader is None
    first = next(n for n, pair in enumerate(ballot.pairs_for("ann")) if {pair.left, pair.right} == {0, 1})
    vote(ballot, "ann", first, "tie")
    assert report(ballot).sentences()[1] == (
        "No ranking yet: base and bad were not compared, directly or through others."
    )
    assert [row["strength"] for row in report(ballot).table()] == [None] * 3


def test_a_variant_that_one_prompt_connects_is_ranked_without_a_verdict(ballot: Ballot) -> None:
    for number, pair in enumerate(ballot.pairs_for("ann")):
        if {pair.left, pair.right} == {0, 1} or (pair.left + pair.right == 2 and pair.cell == 0):
            vote(ballot, "ann", number, "left" if pair.left > pair.right else "right")
    found = json.loads(report(ballot).to_json())
    rows = {row["name"]: row for row in found["ranking"]}
    assert rows["good"]["interval"] and rows["bad"]["interval"] is None
    assert rows["bad"]["verdict"] == "not distinguishable" and rows["bad"]["difference"] > 0
    assert "Votes on a single prompt give no interval: vote on several to know." in report(ballot).sentences()
    assert "not distinguishable from" in report(ballot).sentences()[1] and report(ballot).chart() is not None


def test_wins_are_counted_by_prompt_with_ties_as_halves(ballot: Ballot) -> None:
    elect(ballot, "ann", {"base": 1, "good": 1, "bad": 0})
    wins = report(ballot).wins
    assert wins.shape == (4, 3, 3)
    assert (wins[:, 0, 1] == 1).all() and (wins[:, 1, 0] == 1).all()  # two seeds, half each
    assert (wins[:, 0, 2] == 2).all() and not wins[:, 2, 0].any()


@pytest.mark.parametrize("bad", ["", "  ", "x" * 65, 3, None, "a\nb"])
def test_bad_raters_and_choices(bad: Any) -> None:
    with pytest.raises(ValueError, match="rater is"):
        require_rater(bad)
    with pytest.raises(ValueError, match="choice is .*: give left, right, tie"):
        require_choice(bad)
    assert require_rater(" ann ") == "ann" and require_choice("tie") == "tie"
