"""Comparing variants: their images are those of SDXL Generate, and the scores decide with intervals."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_lora_core.cache.folders import CacheFolders
from sdxl_lora_core.evaluation.choice import OVERALL, Memorisation, choose, criteria, find_memorised
from sdxl_lora_core.evaluation.choice_chart import choice_chart
from sdxl_lora_core.evaluation.comparison import Cell, Comparison, ComparisonJob, Result, compare
from sdxl_lora_core.evaluation.comparison_chart import comparison_chart
from sdxl_lora_core.evaluation.comparison_grid import LARGEST, comparison_grid
from sdxl_lora_core.evaluation.comparison_report import sentences, table_rows, to_csv, to_json
from sdxl_lora_core.evaluation.html_report import comparison_page
from sdxl_lora_core.evaluation.metrics import OnlyFor, ReferenceSimilarity
from sdxl_lora_core.evaluation.references import References
from sdxl_lora_core.evaluation.saving import save_comparison
from sdxl_lora_core.evaluation.similarity import Features
from sdxl_lora_core.evaluation.strength_search import rounds_in_words, search, widened
from sdxl_lora_core.evaluation.variants import LoRAFiles, Variant, make_variants, parse_axis
from sdxl_lora_core.generation.generate import generate
from sdxl_lora_core.generation.job import GenerationContext, GenerationJob
from sdxl_lora_core.lora.stack import LoRARef
from sdxl_lora_core.sdxl.base import SDXLBase
from tests.micro import vision
from tests.micro.images import SHARED, settings, write_lora


@dataclass(frozen=True)
class Brightness:
    """A metric that needs no model."""

    name: str = "brightness"
    title: str = "brightness of the image"

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Sequence[float]:
        return [float(image.mean()) for image in images]


def comparison(scores: dict[str, Any], prompts: int = 0, **changes: Any) -> Comparison:
    """A comparison with given scores [prompts, seeds] by variant, and grey images of 16 x 16 px."""
    arrays = {name: np.asarray(values, dtype=float) for name, values in scores.items()}
    rows, seeds = next(iter(arrays.values())).shape
    names = tuple(f"prompt {number}" for number in range(rows))
    results = []
    for number, (name, values) in enumerate(arrays.items()):
        pixels = np.full((16, 16, 3), 10 * number, dtype=np.uint8)
        cells = tuple(Cell(pixels, prompt, seed, f"key{seed}", False) for prompt in names for seed in range(seeds))
        results.append(Result(Variant(name), cells, {"score": values}))
    return replace(Comparison(names, tuple(range(seeds)), tuple(results), {"score": "the score"}), **changes)


def noisy(mean: float, seed: int, prompts: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1, (prompts, 4))


# The images


@pytest.fixture
def context(tmp_path: Path) -> GenerationContext:
    return GenerationContext(SHARED, CacheFolders(tmp_path / "cache"))


@pytest.mark.slow
def test_every_cell_is_the_image_of_generate_bit_for_bit_and_is_made_once(
    micro_base: SDXLBase, tmp_path: Path, context: GenerationContext
) -> None:
    """4 checkpoints x 3 strengths x 2 prompts."""
    folder = tmp_path / "loras/own"
    folder.mkdir(parents=True)
    steps = {step: write_lora(folder / f"step-{step:06d}.safetensors", micro_base, seed=step) for step in (1, 2, 3)}
    last = write_lora(tmp_path / "loras/own.safetensors", micro_base, seed=4)
    paths = {lora.path.name: lora.path for lora in (*steps.values(), last)}
    files = LoRAFiles(
        lambda name, model, clip: LoRARef(paths[Path(name).name], name, model, clip),
        lambda name: {step: lora.path.name for step, lora in steps.items()},
    )
    variants = make_variants((last,), parse_axis("checkpoint: all"), parse_axis("strength: 0.5, 1, 1.5"), files)
    config = settings(prompt="a red circle\na blue star", steps=2, prompt_per_line=True)
    job = ComparisonJob(micro_base, config, variants, (Brightness(),))
    seen: list[str] = []
    found = compare(job, context, lambda done, total, name: seen.append(f"{done} of {total}: {name}"))
    assert len(found.results) == 13 and found.generated == (26, 0)
    assert seen[:2] == ["0 of 13: base", "1 of 13: strength 0.5 / checkpoint 1"]
    for result in found.results:
        plain = generate(GenerationJob(micro_base, config, result.variant.loras), GenerationContext(SHARED))
        assert len(plain) == len(result.cells) == 2
        for cell, image in zip(result.cells, plain, strict=True):
            assert cell and np.array_equal(cell.pixels, image.pixels) and cell.key == image.key
    assert len({cell.pixels.tobytes() for result in found.results for cell in result.cells if cell}) == 26
    again = compare(job, replace(context, on_step=lambda done, total: pytest.fail("an image is made")))
    assert again.generated == (26, 26)
    scores = again.results[3].scores["brightness"]
    assert scores.tolist() == [[cell.pixels.mean()] for cell in again.results[3].cells if cell]


@pytest.mark.slow
def test_settings_and_given_images_are_variants_with_the_same_seeds(
    micro_base: SDXLBase, context: GenerationContext
) -> None:
    given = vision.pictures(4, 64, 64)
    variants = (Variant("base"), Variant("one step", settings={"steps": "1"}), Variant("mine", given=given))
    config = settings(prompt="one\ntwo", steps=2, count=2, seed=2**64 - 1)
    found = compare(ComparisonJob(micro_base, config, variants), context)
    assert found.seeds == (2**64 - 1, 0) and found.prompts == ("one", "two") and found.generated == (8, 0)
    pairs = [("one", 2**64 - 1), ("one", 0), ("two", 2**64 - 1), ("two", 0)]
    for result in found.results:
        assert [(cell.prompt, cell.seed) for cell in result.cells if cell] == pairs
    assert [cell.pixels is image for cell, image in zip(found.results[2].cells, given, strict=True) if cell] == [
        True
    ] * 4
    one = generate(GenerationJob(micro_base, replace(config, steps=1, prompt_per_line=True)), GenerationContext(SHARED))
    assert [image.key for image in one] == [cell.key for cell in found.results[1].cells if cell]


@pytest.mark.slow
def test_a_cancelled_comparison_finds_its_images_again(micro_base: SDXLBase, context: GenerationContext) -> None:
    variants = (Variant("base"), Variant("one step", settings={"steps": "1"}))
    job = ComparisonJob(micro_base, settings(steps=2), variants)

    def cancel(done: int, total: int, name: str) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(job, context, cancel)
    assert compare(job, context).generated == (2, 1)


@pytest.mark.parametrize(
    ("variants", "config", "message"),
    [
        ((Variant("base"), Variant("base")), settings(), "two variants are called 'base'"),
        ((Variant("base"),), settings(prompt="  "), "prompt is empty: give one prompt per line"),
        ((Variant("base"), Variant("x", settings={"steps": "0"})), settings(), "variant x: steps is 0"),
        (
            (Variant("base"), Variant("mine", given=vision.pictures(3))),
            settings(prompt="one\ntwo", count=2),
            "variant mine has 3 images: a comparison of 2 prompts and 2 seeds needs 4",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_before_an_image_is_made(
    micro_base: SDXLBase, variants: tuple[Variant, ...], config: Any, message: str
) -> None:
    context = GenerationContext(SHARED, on_step=lambda done, total: pytest.fail("an image is made"))
    with pytest.raises(ValueError, match=message):
        compare(ComparisonJob(micro_base, config, variants), context)


# The decision


def test_the_better_variant_wins_and_the_table_says_by_how_much() -> None:
    found = comparison({"base": noisy(20, 0), "good": noisy(24, 1), "bad": noisy(18, 2)})
    assert (found.leader("score"), found.winner("score"), found.undecided("score")) == (1, 1, [])
    base, good, bad = table_rows(found, "score")
    assert base.keys() == {"name", "mean", "deviation"} and base["mean"] == pytest.approx(20, abs=0.5)
    assert (good["verdict"], bad["verdict"]) == ("better", "worse") and good["interval"][0] > 3
    assert good["difference"] == pytest.approx(found.results[1].scores["score"].mean() - base["mean"], abs=1e-5)
    assert sentences(found)[0].startswith("the score: good is the best with 23.97")
    assert re.search(r"\+\d\.\d\d \(\+\d.* to \+\d.*\) over base\.$", sentences(found)[0])


def test_equal_variants_have_no_winner() -> None:
    found = comparison({"base": noisy(20, 0), "first": noisy(24, 1), "second": noisy(24, 2)})
    leader = found.leader("score")
    assert found.winner("score") is None and leader in (1, 2) and found.undecided("score") == [3 - (leader or 0)]
    assert "is not told apart from" in sentences(found)[0]


def test_a_single_prompt_is_said_not_to_decide() -> None:
    found = comparison({"base": [[1.0, 2, 3]], "good": [[5.0, 6, 7]]})
    assert found.winner("score") is None and "A single prompt gives no interval" in sentences(found)[-1]


def test_scores_that_are_not_numbers() -> None:
    found = comparison({"base": [[math.nan], [math.nan]], "x": [[math.nan], [math.nan]]})
    assert found.leader("score") is None and "no image has a score" in sentences(found)[0]
    document = json.loads(to_json(found))
    assert document["metrics"]["score"]["winner"] is None
    assert document["variants"][0]["images"][0]["score"] is None


# What is written


def test_json_and_csv_have_every_image_and_every_pair() -> None:
    found = comparison({"base": noisy(20, 0, 3), "a": noisy(21, 1, 3), "b": noisy(22, 2, 3)})
    document = json.loads(to_json(found))
    assert [variant["name"] for variant in document["variants"]] == ["base", "a", "b"]
    pairs = document["metrics"]["score"]["pairs"]
    assert [(pair["first"], pair["second"]) for pair in pairs] == [("a", "base"), ("b", "base"), ("b", "a")]
    rows = list(csv.DictReader(io.StringIO(to_csv(found))))
    assert len(rows) == 36 and rows[13]["variant"] == "a" and rows[13]["seed"] == "1"
    assert float(rows[13]["score"]) == pytest.approx(found.results[1].scores["score"][0, 1], abs=1e-5)


def on_axes(rows: Sequence[str], columns: Sequence[str], side: int = 32) -> Comparison:
    places = [("", ""), *((row, column) for row in rows for column in columns)]
    results = []
    for number, (row, column) in enumerate(places):
        pixels = np.full((side, side, 3), 20 * number + 20, dtype=np.uint8)
        cells = tuple(Cell(pixels + prompt, f"prompt {prompt}", 7, "", False) for prompt in range(2))
        name = " / ".join(filter(None, (row, column))) or "base"
        results.append(Result(Variant(name, row=row, column=column), cells, {}))
    return Comparison(("prompt 0", "prompt 1"), (7,), tuple(results), {})


def test_a_grid_shows_each_image_in_its_place_and_the_base_in_each_row() -> None:
    grid = comparison_grid(on_axes(["r1", "r2"], ["c1", "c2"]))
    pictures = [(grid == value).all(2) for value in (20, 40, 60, 80, 100, 21, 41, 61, 81, 101)]
    assert [int(shown.sum()) // 1024 for shown in pictures] == [2, 1, 1, 1, 1, 2, 1, 1, 1, 1]
    lefts, tops = ([int(np.flatnonzero(shown.sum(axis) >= 32)[0]) for shown in pictures] for axis in (0, 1))
    assert lefts[0] < lefts[1] < lefts[2] and lefts[:3] == [lefts[5], lefts[3], lefts[4]] == [lefts[0], *lefts[6:8]]
    assert tops[0] == tops[1] == tops[2] < tops[3] == tops[4] < tops[5] == tops[6] < tops[8] == tops[9]


def test_a_grid_of_many_large_images_is_scaled_to_its_largest_side() -> None:
    grid = comparison_grid(on_axes([f"r{n}" for n in range(4)], ["c1"], side=1400))
    assert max(grid.shape) < 1.2 * LARGEST and grid.shape[0] > 0.9 * LARGEST


def test_a_grid_leaves_a_gap_where_there_is_no_image() -> None:
    found = comparison({"base": noisy(1, 0, 2), "mine": noisy(1, 1, 2)})
    gap = replace(found.results[1], cells=(None, *found.results[1].cells[1:]))
    grids = [comparison_grid(replace(found, results=(found.results[0], mine))) for mine in (found.results[1], gap)]
    shown = [int((grid == 10).all(2).sum()) for grid in grids]
    assert shown == [8 * 256, 7 * 256] and grids[0].shape == grids[1].shape


def test_the_page_is_one_file_with_every_image_and_escaped_texts() -> None:
    found = comparison({"base": noisy(20, 0, 2), "<b>bold</b>": noisy(24, 1, 2)})
    page = comparison_page(found, comparison_chart(found), "a & b")
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 1 + 16 and all(source.startswith("data:image/") for source in sources)
    assert "<b>bold" not in page and "&lt;b&gt;bold" in page and "<title>a &amp; b</title>" in page
    assert "https://" not in page and "http://" not in page
    assert page.count("<tr") == 1 + 2 + 1 + 8


def test_charts_have_a_row_for_each_metric() -> None:
    found = comparison({"base": noisy(20, 0), "good": noisy(24, 1)})
    one = comparison_chart(found)
    two = comparison_chart(choose(found, None).comparison)
    assert one.shape[1:] == two.shape[1:] == (1200, 3) and two.shape[0] > 1.6 * one.shape[0]
    assert comparison_chart(comparison({"base": noisy(20, 0, 1), "x": noisy(21, 1, 1)})).shape[1] == 1200


def test_a_comparison_is_saved_to_the_next_free_folder(tmp_path: Path) -> None:
    found = comparison({"base": noisy(20, 0, 2), "good": noisy(24, 1, 2)})
    first, second = save_comparison(found, tmp_path, "sub/mine"), save_comparison(found, tmp_path, "sub/mine", "{}")
    assert (first.folder, second.folder) == (tmp_path / "sub/mine", tmp_path / "sub/mine_00002")
    assert sorted(path.name for path in first.folder.iterdir()) == [
        "chart.png",
        "grid.png",
        "images.csv",
        "report.html",
        "report.json",
    ]
    assert np.array_equal(np.asarray(Image.open(first.folder / "grid.png")), first.grid)
    assert json.loads((first.folder / "report.json").read_text())["baseline"] == "base"
    assert (second.folder / "report.json").read_text() == "{}"
    with pytest.raises(ValueError, match="save_as"):
        save_comparison(found, tmp_path, "../mine")


# Choosing


def test_the_best_is_the_highest_overall_that_did_not_memorise() -> None:
    found = comparison({"base": noisy(20, 0), "step 1": noisy(24, 1), "step 2": noisy(28, 2)})
    assert choose(found, None).best == 2
    memorised = Memorisation(0.9, (0, 0, 30), (False, False, True))
    choice = choose(found, memorised)
    assert choice.best == 1 and "Memorised training images: step 2." in choice.sentences()
    assert [row["flag"] for row in choice.rows()] == ["", "best", "memorised"]
    everyone = choose(found, Memorisation(0.9, (0, 30, 30), (False, True, True)))
    assert everyone.best == 2 and any("All of them did" in sentence for sentence in everyone.sentences())
    assert json.loads(choice.to_json())["best"] == "step 1"


def test_overall_weighs_scores_of_different_scales_alike() -> None:
    found = comparison({"base": noisy(20, 0), "a": noisy(22, 1), "b": noisy(20, 2)})
    results = [
        replace(result, scores={**result.scores, "large": 1000 * noisy(0, 10 + number) + 2000 * (number == 2)})
        for number, result in enumerate(found.results)
    ]
    both = replace(found, results=tuple(results), titles={**found.titles, "large": "a large score"})
    rated = choose(both, None).comparison
    assert rated.mean(OVERALL, 0) == pytest.approx(0, abs=1e-9)
    assert rated.mean(OVERALL, 1) == pytest.approx(rated.mean(OVERALL, 2), abs=0.35)
    stacked = {metric: np.stack([result.scores[metric] for result in results]) for metric in ("score", "large")}
    wanted = np.mean([(values[1] - values[0].mean()) / values.std() for values in stacked.values()], axis=0)
    assert np.allclose(rated.results[1].scores[OVERALL], wanted)


def test_without_any_score_there_is_no_best() -> None:
    with pytest.raises(ValueError, match="no image has a score"):
        choose(comparison({"base": [[1.0]], "x": [[math.nan]]}), None)


def test_novel_prompts_are_scored_for_adherence_only(tmp_path: Path) -> None:
    features = Features(vision.dinov2(tmp_path / "dino"))
    similarity = ReferenceSimilarity(features, vision.pictures(2, seed=9))
    known, novel, close = criteria(Brightness(), similarity, ["a"], ["b"])
    images, prompts = vision.pictures(3), ["a", "b", "a"]
    light = [image.mean() for image in images]
    assert np.allclose(known.score(images, prompts), [light[0], math.nan, light[2]], equal_nan=True)
    assert np.allclose(novel.score(images, prompts), [math.nan, light[1], math.nan], equal_nan=True)
    cosines = features.unit([images[0]]) @ features.unit(similarity.references).T
    assert close.score(images, prompts)[0] == pytest.approx(100 * cosines.mean().item(), abs=1e-4)
    assert [metric.name for metric in criteria(Brightness(), None, ["a"], [])] == ["brightness"]
    assert isinstance(known, OnlyFor) and known.title == "brightness of the image"


def test_a_variant_that_copies_training_images_is_flagged() -> None:
    training, held_out = vision.pictures(4, seed=1), vision.pictures(6, seed=2)
    found = comparison({"base": np.ones((4, 4)), "copies": np.ones((4, 4)), "good": np.ones((4, 4))})
    new = [vision.pictures(16, seed=3), [training[i % 4] for i in range(16)], vision.pictures(16, seed=4)]
    results = tuple(
        replace(r, cells=tuple(Cell(p, "", 0) for p in pixels)) for r, pixels in zip(found.results, new, strict=True)
    )
    made, names = replace(found, results=results), tuple("abcd")
    memorised = find_memorised(made, References(held_out, training, names))
    assert memorised and memorised.counts[1] == 16 and memorised.flagged == (False, True, False)
    as_near = replace(made, results=(results[1], results[1], results[2]))  # the prompts alone bring the base as near
    near = find_memorised(as_near, References(held_out, training, names))
    assert near and near.counts[:2] == (16, 16) and near.flagged == (False, False, False)
    gaps = replace(results[1], cells=(*results[1].cells[:15], None))
    assert (few := find_memorised(replace(made, results=(results[0], gaps)), References(held_out, training, names)))
    assert few.counts[1] == 15 and few.flagged == (False, True)
    assert find_memorised(found, References(held_out[:1], training, names)) is None
    assert find_memorised(found, References(held_out)) is None


def test_the_chart_of_a_choice() -> None:
    found = comparison({"base": noisy(20, 0), "a": noisy(24, 1)})
    choice = choose(found, Memorisation(0.9, (0, 30), (False, True)))
    red = (choice_chart(choice) == (0xB3, 0x26, 0x1E)).all(2).sum()
    assert red > 50 and (choice_chart(choose(found, None)) == (0xB3, 0x26, 0x1E)).all(2).sum() == 0


@dataclass
class Scripted:
    """Scores by the variant's place: `levels` of the base, of the second and of the third, with some noise."""

    levels: tuple[float, float, float]
    name: str = "scripted"
    title: str = "scripted"

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Sequence[float]:
        variants = self.levels[: len(images) // (3 * (1 + (len(images) > 9) + 2 * (len(images) > 18)))]
        noise = np.random.default_rng(len(images)).normal(0, 0.1, len(images))
        return (noise + np.repeat(variants, len(images) // len(variants))).tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("levels", "seeds", "images"), [((0, 5, 1), [1], (3, 3, 3)), ((0, 5, 5), [1, 2, 4], (12, 12, 12))]
)
def test_a_search_gives_more_seeds_only_while_the_best_are_not_told_apart(
    micro_base: SDXLBase,
    context: GenerationContext,
    levels: tuple[float, float, float],
    seeds: list[int],
    images: tuple[int, ...],
) -> None:
    variants = tuple(Variant(name, settings={"steps": str(steps)}) for name, steps in (("base", 1), ("a", 2), ("b", 3)))
    config = settings(prompt="one\ntwo\nthree", count=4)
    found, rounds = search(ComparisonJob(micro_base, config, variants, (Scripted(levels),)), context)
    assert [part.seeds for part in rounds] == seeds
    assert rounds_in_words(rounds).startswith("1 seed: base, a, b")
    assert tuple(len(result.cells) for result in found.results) == images


def test_a_variant_left_out_of_a_search_has_gaps() -> None:
    result = comparison({"x": [[1.0], [2.0]]}).results[0]
    wide = widened(result, seeds=2, prompts=2)
    assert [cell is None for cell in wide.cells] == [False, True, False, True]
    assert np.array_equal(wide.scores["score"], [[1, math.nan], [2, math.nan]], equal_nan=True)
    assert widened(wide, 2, 2) is wide
