"""Selecting images by score, and recall of tags."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from sdxl_lora_core.evaluation.config import FilterConfig
from sdxl_lora_core.evaluation.selection import select
from sdxl_lora_core.evaluation.tag_recall import Tagger, looks_like_tags, split_prompt
from sdxl_lora_core.vision.classifier import class_logits, load_classifier
from sdxl_lora_core.vision.model_folder import load_processor
from tests.micro import vision

SCORES = [20.0, 31.0, math.nan, 25.0, 31.0]


@pytest.mark.parametrize(
    ("config", "accepted"),
    [
        (FilterConfig(keep="best", best=2), (1, 4)),
        (FilterConfig(keep="best", best=3), (1, 4, 3)),
        (FilterConfig(keep="best", best=9), (1, 4, 3, 0)),
        (FilterConfig(keep="threshold", threshold=25.0), (1, 4, 3)),
        (FilterConfig(keep="threshold", threshold=40.0), ()),
    ],
)
def test_the_best_or_those_above_the_threshold_are_accepted(config: FilterConfig, accepted: tuple[int, ...]) -> None:
    found = select(SCORES, config)
    assert found.accepted == accepted and found.rejected == tuple(i for i in range(5) if i not in accepted)


def test_the_summary_names_n_and_the_mean_of_all() -> None:
    summary = select(SCORES, FilterConfig(best=1)).summary
    assert summary.startswith("The best 1 of 5 images accepted; the mean score of all is 26.8, of the accepted 31;")
    assert summary.endswith("; 1 without a score rejected.")
    assert select(SCORES, FilterConfig(keep="threshold", threshold=40)).summary.startswith("0 of at least 40 of 5")
    assert select([math.nan], FilterConfig()).accepted == ()


def test_recall_counts_the_tags_that_the_tagger_knows(tmp_path: Path) -> None:
    labels = ["red", "long_hair", "cat", "1girl"]
    folder, images = vision.classifier(tmp_path / "tagger", labels), vision.pictures(2)
    model = load_classifier(folder)
    found = class_logits(model, load_processor(folder, model), images).sigmoid()
    names = [label.replace("_", " ") for label in labels]
    for threshold in (0.3, float(found[0].median())):
        recalls = Tagger(folder, threshold).recalls(images, ["Red, long hair, 1girl, sword", "sword"])
        wanted = [name for i, name in enumerate(names) if name != "cat" and found[0, i] >= threshold]
        assert list(recalls[0].found) == wanted and recalls[0].unknown == ("sword",)
        assert recalls[0].recall == pytest.approx(len(wanted) / 3) and math.isnan(recalls[1].recall)
        assert {*recalls[0].found, *recalls[0].missing} == {"red", "long hair", "1girl"}
    assert torch.is_grad_enabled()


def test_lists_of_tags_are_known_from_sentences() -> None:
    assert looks_like_tags("1girl, solo, long_hair, red eyes") and not looks_like_tags("a red cat, on a table")
    assert not looks_like_tags("a woman with long hair, sitting on a bench, in a park at night, photo of a kind")
    assert split_prompt("Long_Hair,  long hair,, cat ") == ("long hair", "cat")
