"""DreamBooth: regularisation images beside the training images, given or drawn by the base."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from sdxl_lora_core.dataset.caption_dataset import CaptionDataset, load_caption_dataset
from sdxl_lora_core.dataset.config import DatasetConfig
from sdxl_lora_core.dataset.report import contact_sheet, describe
from sdxl_lora_core.runtime.loaded_parts import LoadedParts
from sdxl_lora_core.sdxl.base import SDXLBase
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.data.batches import Batch, PassOfUpdate
from sdxl_lora_core.training.job import TrainingJob
from sdxl_lora_core.training.loop import Loop
from sdxl_lora_core.training.model.trainable import TrainableSDXL
from sdxl_lora_core.training.monitor.progress import StepReport
from sdxl_lora_core.training.run_length import batches_per_epoch
from tests.micro.runs import (
    CPU,
    SMALL,
    Cancelled,
    Losses,
    Train,
    cancel_at,
    change_losses,
    data_of,
    load,
    lora_bytes,
    weights,
)

SHORT = replace(SMALL, steps=2)


def with_class(**more: Any) -> TrainConfig:
    return replace(SHORT, **{"class_prompt": "a picture", "class_images": 2, **more})


@pytest.fixture
def both(pictures: Path, tmp_path: Path) -> CaptionDataset:
    """Two training images and three regularisation images, one of them seen twice."""
    return with_regularisation(pictures, tmp_path, load(copied(pictures, tmp_path / "mine", 0, 1), trigger_word="zxq"))


def copied(pictures: Path, folder: Path, *numbers: int) -> Path:
    folder.mkdir()
    for number in numbers:
        shutil.copy(pictures / f"{number}.png", folder)
        (folder / f"{number}.txt").write_text(f"a, b, c, number {number}")
    return folder


def with_regularisation(pictures: Path, where: Path, chained: CaptionDataset, repeats: int = 1) -> CaptionDataset:
    folder = copied(pictures, where / "any", 2, 3, 4)
    config = DatasetConfig(resolution=64, is_regularisation=True, repeats=repeats)
    return load_caption_dataset(folder, config, chained)


def test_regularisation_images_are_kept_apart_and_named(both: CaptionDataset, pictures: Path, tmp_path: Path) -> None:
    assert [entry.image.name for entry in both.entries] == ["0.png", "1.png"]
    assert [entry.image.name for entry in both.regularisation] == ["2.png", "3.png", "4.png"]
    assert all("zxq" not in entry.caption for entry in both.regularisation)
    assert "regularisation images: 3" in describe(both)
    assert contact_sheet(both).size[0] > 0
    plain = load_caption_dataset(tmp_path / "any", DatasetConfig(resolution=64), load(tmp_path / "mine"))
    assert plain.fingerprint != both.fingerprint


@pytest.mark.parametrize("setting", [{"trigger_word": "zxq"}, {"validation_percent": 10}], ids=str)
def test_what_regularisation_images_cannot_have_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(setting))} is .* with is_regularisation on"):
        DatasetConfig(is_regularisation=True, **setting)


def test_every_image_is_seen_as_often_as_its_repeats_say(
    micro_base: SDXLBase, pictures: Path, cache: Path, tmp_path: Path
) -> None:
    mine = load(copied(pictures, tmp_path / "mine", 0, 1), repeats=3)
    dataset = with_regularisation(pictures, tmp_path, mine, repeats=2)
    data = data_of(micro_base, dataset, cache)
    passes = batches_per_epoch(TrainingJob(micro_base, dataset, SMALL))
    for epoch in (0, 1):
        steps = range(epoch * passes, (epoch + 1) * passes)
        seen = Counter(index for step in steps for batch in data.micro_batches(step) for index in batch)
        assert seen == {0: 3, 1: 3, 2: 2, 3: 2, 4: 2}


def test_their_captions_are_shown_as_written_and_they_carry_the_prior_weight(
    micro_base: SDXLBase, both: CaptionDataset, cache: Path
) -> None:
    settings = {"caption_dropout": 1.0, "shuffle_tags": True, "tag_dropout": 0.5, "prior_weight": 0.25}
    data = data_of(micro_base, both, cache, **settings)
    empty = data.batch(PassOfUpdate(0, (0,))).embeds[0]
    batch = data.batch(
        PassOfUpdate(
            0,
            (
                0,
                2,
            ),
        )
    )
    assert batch.weights.tolist() == [1.0, 0.25]
    assert torch.equal(batch.embeds[0], empty)
    assert data.captions[2] == ("a, b, c, number 2",) and not torch.equal(batch.embeds[1], empty)
    assert data.captions[0] != ("zxq, a, b, c, number 0",)


def test_the_prior_weight_scales_the_loss_of_these_samples_only(
    run: Train, both: CaptionDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[float, list[tuple[list[float], list[float]]]] = {1.0: [], 0.5: []}
    for weight, found in seen.items():

        def noted(losses: Losses, learner: TrainableSDXL, batch: Batch, step: int, found: Any = found) -> torch.Tensor:
            value = losses(learner, batch)
            found.append((value.tolist(), batch.weights.tolist()))
            return value

        with monkeypatch.context() as patch:
            change_losses(patch, noted)
            run(replace(SHORT, prior_weight=weight, steps=1, batch_size=3), where=str(weight), dataset=both)
    ((full, _),), ((half, weights),) = seen[1.0], seen[0.5]
    assert half == pytest.approx([value * weight for value, weight in zip(full, weights, strict=True)])


def test_each_setting_changes_the_file(run: Train, both: CaptionDataset) -> None:
    plain, lighter = run(SHORT, dataset=both), run(replace(SHORT, prior_weight=0.25), where="b", dataset=both)
    alone = run(SHORT, where="c", dataset=replace(both, regularisation=(), fingerprint="alone"))
    assert len({weights(plain), weights(lighter), weights(alone)}) == 3
    assert plain.report.images == 2 and plain.report.regularisation_images == 3


def test_a_cancelled_run_continues_to_the_same_bytes(run: Train, both: CaptionDataset) -> None:
    config = replace(SHORT, prior_weight=0.5)
    whole = run(config, dataset=both)
    with pytest.raises(Cancelled):
        run(config, where="b", dataset=both, on_step=cancel_at(1))
    assert lora_bytes(run(config, where="b", dataset=both)) == lora_bytes(whole)


def test_regularisation_images_alone_are_refused(run: Train, both: CaptionDataset) -> None:
    with pytest.raises(ValueError, match="has only regularisation images: connect a dataset of training images"):
        run(dataset=replace(both, entries=()))


def test_the_file_says_what_it_was_trained_with(run: Train, both: CaptionDataset) -> None:
    with safe_open(run(replace(SHORT, prior_weight=0.5, shuffle_tags=True), dataset=both).lora_path, "pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_num_reg_images"], metadata["ss_prior_loss_weight"]) == ("3", "0.5")
    assert metadata["ss_shuffle_caption"] == "True" and "ss_masked_loss" not in metadata


def test_run_yaml_names_both_folders(run: Train, both: CaptionDataset) -> None:
    result = run(replace(SHORT, steps=1), dataset=both)
    run_yaml = result.lora_path.parents[1] / "runs" / "small" / "run.yaml"
    datasets = yaml.safe_load(run_yaml.read_text(encoding="utf-8"))["datasets"]
    assert [section["is_regularisation"] for section in datasets] == [False, True]


# Drawn by the base


def drawing(limit: int) -> Callable[[StepReport], None]:
    """Fails as soon as more than `limit` images of 25 steps are to be drawn."""

    def on_step(report: StepReport) -> None:
        if report.phase == "generating class images":
            assert report.total == limit * 25
            drawn.append(report.done)

    drawn: list[int] = []
    return on_step


def class_images(result: Any) -> list[Path]:
    return sorted((result.lora_path.parents[1] / "runs" / "small" / "class_images").glob("*.png"))


def test_class_images_are_drawn_once_and_trained_with(run: Train, tmp_path: Path) -> None:
    own = tmp_path / "cache"  # in which no other test's images lie
    result = run(with_class(), on_step=drawing(2), cache=own)
    assert result.report.regularisation_images == 2
    assert [Image.open(path).size for path in class_images(result)] == [(64, 64)] * 2
    assert class_images(result)[0].read_bytes() != class_images(result)[1].read_bytes()
    again = run(with_class(seed=5, steps=1), where="b", on_step=drawing(0), cache=own)
    assert [path.read_bytes() for path in class_images(again)] == [path.read_bytes() for path in class_images(result)]


def test_one_class_image_for_each_training_image_unless_told_otherwise(run: Train, both: CaptionDataset) -> None:
    dataset = replace(both, regularisation=())
    result = run(replace(SHORT, class_prompt="a picture"), dataset=dataset)
    assert result.report.regularisation_images == 2


def test_class_images_are_seen_about_as_often_as_the_training_images(micro_base: SDXLBase, pictures: Path) -> None:
    dataset = load(pictures, repeats=4)
    assert batches_per_epoch(TrainingJob(micro_base, dataset, with_class(batch_size=1))) == 5 * 4 + 2 * 10


def test_class_images_are_not_drawn_where_there_are_regularisation_images(run: Train, both: CaptionDataset) -> None:
    result = run(with_class(), dataset=both, on_step=drawing(0))
    assert result.report.regularisation_images == 3 and not class_images(result)


def test_a_run_cancelled_while_drawing_and_while_training_ends_with_the_same_bytes(run: Train) -> None:
    whole = run(with_class())

    def cancel(report: StepReport) -> None:
        if report.phase == "training" and report.done == 1:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(with_class(), where="b", on_step=cancel)
    shutil.rmtree(whole.lora_path.parents[2] / "b" / "runs" / "small" / "class_images")
    assert lora_bytes(run(with_class(), where="b")) == lora_bytes(whole)


def test_the_drawing_weights_are_gone_before_the_training(run: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = LoadedParts(CPU)
    held: list[int] = []
    original = Loop.run

    def spy(self: Loop, *args: Any) -> Any:
        held.append(len(parts._held))
        return original(self, *args)

    monkeypatch.setattr(Loop, "run", spy)
    run(with_class(class_prompt="another"), parts=parts)
    assert held == [0]


def test_a_prior_weight_without_regularisation_images_is_refused(run: Train) -> None:
    with pytest.raises(ValueError, match="prior_weight is 0.5 and there are no regularisation images"):
        run(replace(SHORT, prior_weight=0.5))
