"""Similarity to references, diversity, and memorised images."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_lora_core.dataset.caption_dataset import CaptionDataset, load_caption_dataset
from sdxl_lora_core.dataset.config import DatasetConfig
from sdxl_lora_core.dataset.trained_images import read_trained_images, write_trained_images
from sdxl_lora_core.evaluation.copies import Copies, CopyDetector, Nearest, copies_more_than
from sdxl_lora_core.evaluation.references import References, find_references, pictures
from sdxl_lora_core.evaluation.similarity import Features, compare_images, diversity
from sdxl_lora_core.evaluation.similarity_sheet import nearest_pairs
from sdxl_lora_core.images.lazy import Lazy
from tests.micro import vision


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Features:
    return Features(vision.dinov2(tmp_path_factory.mktemp("models") / "dino"))


@pytest.fixture
def dataset(tmp_path: Path) -> CaptionDataset:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(8):
        Image.fromarray(noise(1, 100 + number)[0]).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a picture")
    return load_caption_dataset(folder, DatasetConfig(resolution=64, validation_percent=50))


def noise(count: int, seed: int) -> list[np.ndarray]:
    return vision.pictures(count, 64, 64, seed)


def test_similarity_is_the_mean_cosine_with_all_references(features: Features) -> None:
    images, references = noise(3, 0), noise(2, 1)
    report = compare_images(images, features, References(references))
    a, b = features.raw(images), features.raw(references)
    wanted = torch.cosine_similarity(a[:, None], b[None], dim=2).mean(1)
    assert report.to_references == pytest.approx(wanted.tolist(), abs=1e-5)
    assert report.mean == pytest.approx(wanted.mean().item(), abs=1e-5)
    assert report.order == tuple(wanted.argsort(descending=True).tolist())


def test_diversity_is_the_mean_distance_of_all_pairs(features: Features) -> None:
    assert diversity(torch.eye(3)) == pytest.approx(1)
    assert diversity(torch.tensor([[1.0, 0], [1, 0], [-1, 0]])) == pytest.approx((0 + 2 + 2) / 3)
    assert math.isnan(diversity(torch.ones(1, 3)))
    same = noise(1, 0) * 3
    assert compare_images(same, features, References()).diversity == pytest.approx(0, abs=1e-5)


def test_copies_of_training_images_are_flagged_by_name(features: Features, dataset: CaptionDataset) -> None:
    found = find_references(None, dataset)
    assert (len(found.held_out), len(found.training)) == (4, 4)
    copy = np.array(found.training[2])
    copy[:2] = 0
    smaller = np.asarray(Image.fromarray(found.training[1]).resize((32, 32)))[:, ::-1]
    report = compare_images([copy, smaller, *noise(2, 5)], features, found)
    assert report.copies and report.copies.count == 2
    assert [near.memorised for near in report.copies.nearest] == [True, True, False, False]
    assert [near.index for near in report.copies.nearest[:2]] == [2, 1]
    row = report.rows(found.training_names)[0]
    assert row["nearest"] == dataset.entries[2].image.name and row["memorised"] is True
    assert "2 of 4 images are nearer to a training image" in " ".join(report.sentences())
    assert report.as_json(found.training_names)["memorised"] == 2


def test_the_threshold_is_that_of_the_held_out_images(dataset: CaptionDataset) -> None:
    found = find_references(None, dataset)
    copies = CopyDetector(found).find(list(found.held_out))
    assert copies.count == 0 and copies.threshold  # none is nearer than the nearest of them
    assert copies.threshold == pytest.approx(max(near.correlation for near in copies.nearest))
    small = [np.asarray(Image.fromarray(p).resize((32, 32), Image.Resampling.BOX)).ravel() for p in found.training]
    own = np.asarray(Image.fromarray(found.held_out[0]).resize((32, 32), Image.Resampling.BOX)).ravel()
    wanted = max(np.corrcoef(own, other)[0, 1] for other in small)
    assert (
        copies.nearest[0].correlation == pytest.approx(wanted, abs=0.1)
        and copies.nearest[0].correlation >= wanted - 1e-9
    )


def test_too_few_held_out_images_give_no_flag_but_a_sentence(features: Features, dataset: CaptionDataset) -> None:
    training = pictures(dataset.entries)
    report = compare_images([training[0]], features, References(noise(1, 3), training, tuple("abcd")))
    assert report.copies and report.copies.threshold is None and not report.copies.nearest[0].memorised
    assert "hold out at least 2" in report.sentences()[-1]


def test_more_copies_than_of_the_baseline_are_a_sign_test() -> None:
    def copies(flags: str) -> Copies:
        return Copies(tuple(Nearest(0, 0.9, flag == "x") for flag in flags), 0.5)

    assert copies_more_than(copies("xxxxxxxx"), copies("........")) == pytest.approx(0.5**8)
    assert copies_more_than(copies("xxxxxxx."), copies(".......x")) == pytest.approx(9 / 2**8)
    assert copies_more_than(copies("xx.."), copies("xx..")) == 1


def test_a_reference_that_was_trained_on_is_refused_by_name(dataset: CaptionDataset) -> None:
    name = dataset.entries[1].image.name
    with pytest.raises(ValueError, match=f"1 of the reference images were trained on: {name}"):
        find_references([*noise(1, 0), pictures(dataset.entries)[1]], dataset)
    held_out = dataset.validation[0]
    with pytest.raises(ValueError, match=f"trained on: {held_out.image.name}. A LoRA that memorised"):
        find_references(None, dataset, {held_out.sha256: held_out.image.name})
    assert len(find_references(noise(1, 0), dataset).held_out) == 1


def test_a_run_remembers_its_training_images(dataset: CaptionDataset, tmp_path: Path) -> None:
    assert read_trained_images(tmp_path) is None
    write_trained_images(tmp_path, dataset)
    assert read_trained_images(tmp_path) == {entry.sha256: entry.image.name for entry in dataset.entries}
    (tmp_path / "images.json").write_text("[]")
    assert read_trained_images(tmp_path) is None


def test_the_sheet_shows_both_images_and_says_which_is_memorised(dataset: CaptionDataset) -> None:
    found = find_references(None, dataset)
    images = [*noise(1, 0), np.asarray(found.training[0])]
    first, second = nearest_pairs(images, CopyDetector(found).find(images), found)
    assert (first[:64, :64] == images[1]).all() and (first[:64, 64:128] == found.training[0]).all()
    assert (second[:64, :64] == images[0]).all() and first.shape == second.shape


def test_no_image_is_refused(features: Features) -> None:
    with pytest.raises(ValueError, match="0 images"):
        compare_images([], features, References())


def test_a_lazy_sequence_makes_an_item_at_each_look() -> None:
    made: list[int] = []
    items = Lazy(5, lambda number: made.append(number) or number * 10)
    assert (len(items), items[-1], list(items[1:3])) == (5, 40, [10, 20]) and made == [4, 1, 2]
    with pytest.raises(IndexError):
        items[5]
