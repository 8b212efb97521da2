"""What of an image is learned: masks, alpha channels, random crops; and kohya's numbered folders."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdxl_lora_core.dataset.report import describe
from sdxl_lora_core.images.crop import center_crop
from sdxl_lora_core.sdxl.base import SDXLBase
from sdxl_lora_core.sdxl.latents import crop_pixels
from sdxl_lora_core.training.data.batches import PassOfUpdate, small_batches
from tests.micro.runs import SMALL, Cancelled, Train, cancel_at, data_of, load, lora_bytes, objective, weights

SHORT = replace(SMALL, steps=2)
MASKED = replace(SHORT, masked_loss=True)


def paint_mask(path: Path, box: tuple[int, int, int, int], size: tuple[int, int] = (64, 64)) -> None:
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    path.parent.mkdir(exist_ok=True)
    mask.save(path)


@pytest.fixture
def folder(pictures: Path, tmp_path: Path) -> Path:
    """Three pictures, of which the first has a mask of its left half and the second an alpha channel."""
    folder = tmp_path / "masked"
    folder.mkdir()
    for number in range(3):
        shutil.copy(pictures / f"{number}.png", folder)
        (folder / f"{number}.txt").write_text(f"picture number {number}")
    paint_mask(folder / "masks" / "0.png", (0, 0, 32, 64))
    alpha = Image.new("L", (64, 64), 0)
    alpha.paste(255, (0, 0, 64, 16))
    picture = Image.open(folder / "1.png").convert("RGBA")
    picture.putalpha(alpha)
    picture.save(folder / "1.png")
    return folder


# Masks


def test_masks_are_found_and_are_no_pictures(folder: Path) -> None:
    dataset = load(folder)
    masks = [entry.mask and entry.mask.relative_to(folder).as_posix() for entry in dataset.entries]
    assert masks == ["masks/0.png", "1.png", None] and dataset.problems == ()
    assert "masks (used with masked_loss): 2" in describe(dataset)


def test_masks_belong_to_images_in_images_and_in_kohya_folders(pictures: Path, tmp_path: Path) -> None:
    for name in ("a/images/x", "b/3_cat/x"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True)
        shutil.copy(pictures / "0.png", path)
        path.with_suffix(".txt").write_text("one")
    paint_mask(tmp_path / "a/masks/x.png", (0, 0, 9, 9))
    (tmp_path / "b/masks").mkdir()
    paint_mask(tmp_path / "b/masks/3_cat/x.png", (0, 0, 9, 9))
    for root in ("a", "b"):
        (entry,) = load(tmp_path / root).entries
        assert entry.mask is not None and entry.mask.name == "x.png" and entry.mask != entry.image
    assert entry.repeats == 3


def test_a_mask_without_its_picture_is_a_picture(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    shutil.copy(pictures / "0.png", tmp_path / "masks" / "carnival.png")
    (tmp_path / "masks" / "carnival.txt").write_text("a venetian mask")
    assert [entry.caption for entry in load(tmp_path).entries] == ["a venetian mask"]


def test_a_mask_that_cannot_be_used_is_named(folder: Path) -> None:
    paint_mask(folder / "masks" / "2.png", (0, 0, 0, 0))
    (folder / "masks" / "0.png").write_bytes(b"no picture")
    dataset = load(folder)
    reasons = {problem.file: problem.reason for problem in dataset.problems}
    assert "cannot be used" in reasons["masked/masks/0.png"] and "is all black" in reasons["masked/masks/2.png"]
    assert [entry.mask is None for entry in dataset.entries] == [True, False, True]


def test_white_paint_on_transparency_is_a_mask_of_the_paint(
    micro_base: SDXLBase, folder: Path, cache: Path, tmp_path: Path
) -> None:
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 32, 64))
    before = load(folder)
    mask.save(folder / "masks" / "0.png")
    dataset = load(folder)
    data = data_of(micro_base, dataset, cache, masked_loss=True)
    torch.testing.assert_close(data.variants[0][0].mask()[0], torch.tensor([1.0] * 4 + [0.0] * 4).expand(8, 8))
    assert dataset.fingerprint != before.fingerprint and dataset.entries[0].mask_has_alpha


def test_a_mask_with_an_opaque_alpha_channel_keeps_the_fingerprint(folder: Path) -> None:
    path = folder / "masks" / "0.png"
    Image.open(path).convert("RGBA").save(path)
    assert not load(folder).entries[0].mask_has_alpha


def test_masks_are_judged_where_the_image_is_cropped(pictures: Path, tmp_path: Path) -> None:
    """The bucket keeps the middle 128 x 32 pixels of an image of 256 x 32."""
    for number, box in enumerate([(0, 0, 40, 32), (60, 0, 200, 32), (0, 0, 256, 32), (0, 0, 256, 31)]):
        Image.new("RGB", (256, 32), (number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("one")
        paint_mask(tmp_path / "masks" / f"{number}.png", box, (256, 32))
    dataset = load(tmp_path)
    found = {Path(problem.file).name: (problem.reason, problem.skipped) for problem in dataset.problems}
    assert set(found) == {"0.png", "1.png", "2.png"}
    assert "is all black where it is cropped" in found["0.png"][0] and found["0.png"][1]
    assert found["1.png"] == found["2.png"] == ("is all white where it is cropped, so it has no effect", False)
    assert [entry.mask is None for entry in dataset.entries] == [True, False, False, False]


def test_fully_transparent_images_are_not_trained_on(pictures: Path, tmp_path: Path) -> None:
    for number, alpha in enumerate([0, 255, 128]):
        image = Image.open(pictures / f"{number}.png").convert("RGBA")
        image.putalpha(alpha)
        image.save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("one")
    dataset = load(tmp_path)
    assert [entry.image.name for entry in dataset.entries] == ["1.png", "2.png"]
    (problem,) = dataset.problems
    assert problem.skipped and "is fully transparent" in problem.reason
    shutil.move(tmp_path / "0.png", tmp_path / "only.png")
    for number in (1, 2):
        (tmp_path / f"{number}.png").unlink()
    with pytest.raises(ValueError, match="none of the 1 image"):
        load(tmp_path)


def test_buckets_that_cannot_fill_a_batch_are_named(
    micro_base: SDXLBase, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, size in enumerate([(64, 64), (96, 48), (48, 96), (128, 32), (32, 128)]):
        Image.new("RGB", size, (number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("one")
    data = data_of(micro_base, load(tmp_path), cache, batch_size=8)
    note = small_batches(data.job)
    assert note and note.startswith("batch_size is 8, but the mean batch has 1.0 images") and note in caplog.text
    assert small_batches(replace(data.job, config=replace(data.config, batch_size=1))) is None


def test_the_fingerprint_covers_a_mask(folder: Path) -> None:
    before = load(folder).fingerprint
    paint_mask(folder / "masks" / "0.png", (0, 0, 8, 64))
    assert load(folder).fingerprint != before


def test_masks_lie_on_the_latents_grid_cut_and_mirrored_with_them(
    micro_base: SDXLBase, folder: Path, cache: Path
) -> None:
    data = data_of(micro_base, load(folder, flip=True), cache, masked_loss=True)
    (left, mirrored), (top, _) = ([sample.mask()[0] for sample in data.variants[index]] for index in (0, 1))
    half, quarter = (torch.tensor([1.0] * ones + [0.0] * (8 - ones)).expand(8, 8) for ones in (4, 2))
    torch.testing.assert_close(left, half)
    torch.testing.assert_close(mirrored, half.flip(1))
    torch.testing.assert_close(top, quarter.T)
    assert torch.equal(data.variants[2][0].mask(), torch.ones(1, 8, 8))


def test_a_mask_is_cut_where_the_picture_is(micro_base: SDXLBase, tmp_path: Path, cache: Path) -> None:
    """The mask is white where the picture is, so the cut picture and the cut mask have to agree, whatever the crop."""
    folder = tmp_path / "wide"
    folder.mkdir()
    paint_mask(folder / "masks" / "a.png", (70, 0, 101, 64), (101, 64))
    Image.open(folder / "masks" / "a.png").convert("RGB").save(folder / "a.png")
    (folder / "a.txt").write_text("one")
    data = data_of(micro_base, load(folder, random_crops=4, flip=True), cache, masked_loss=True)
    for sample in data.variants[0]:
        pixels = crop_pixels(Image.open(folder / "a.png").convert("RGB"), sample.crop, sample.mirrored)[:1] / 2 + 0.5
        expected = torch.nn.functional.avg_pool2d(pixels, 8)
        torch.testing.assert_close(sample.mask(), expected, atol=1e-5, rtol=0)


def test_the_loss_is_the_mean_over_the_mask(micro_base: SDXLBase) -> None:
    prediction, nothing = torch.randn(3, 4, 8, 8), torch.zeros(3, 4, 8, 8)
    masks = torch.zeros(3, 1, 8, 8)
    masks[0] = 1
    masks[1, :, :2, :3] = 1
    losses = objective(micro_base).losses(prediction, nothing, nothing, torch.tensor([1, 2, 3]), masks)
    wanted = torch.stack([prediction[0].square().mean(), prediction[1, :, :2, :3].square().mean(), torch.tensor(0.0)])
    torch.testing.assert_close(losses, wanted)
    half = objective(micro_base).losses(prediction, nothing, nothing, torch.tensor([1, 2, 3]), masks / 2)
    torch.testing.assert_close(half, wanted)


def test_what_is_masked_has_no_gradient(micro_base: SDXLBase) -> None:
    prediction = torch.randn(1, 4, 8, 8, requires_grad=True)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    objective(micro_base).losses(prediction, *[torch.zeros(1, 4, 8, 8)] * 2, torch.tensor([1]), mask).sum().backward()
    assert prediction.grad is not None
    assert (prediction.grad[..., 4:] == 0).all() and (prediction.grad[..., :4] != 0).all()


def test_masked_loss_changes_the_file_and_masks_alone_do_not(run: Train, folder: Path) -> None:
    dataset = load(folder)
    plain, masked = run(SHORT, dataset=dataset), run(MASKED, where="b", dataset=dataset)
    shutil.rmtree(folder / "masks")
    without = run(SHORT, where="c", dataset=load(folder))
    assert weights(plain) == weights(without) != weights(masked)


def test_a_mask_that_shows_everything_changes_nothing_but_rounding(run: Train, folder: Path) -> None:
    for number in range(3):
        paint_mask(folder / "masks" / f"{number}.png", (0, 0, 64, 64))
    dataset = load(folder)
    plain, masked = (load_file(run(c, where=str(n), dataset=dataset).lora_path) for n, c in enumerate((SHORT, MASKED)))
    for name, tensor in plain.items():
        torch.testing.assert_close(masked[name], tensor, atol=1e-5, rtol=1e-3)


def test_masked_loss_without_any_mask_is_refused(run: Train) -> None:
    with pytest.raises(ValueError, match="masked_loss is on and no image of .* has a mask"):
        run(MASKED)


def test_a_mask_that_changed_after_loading_is_named(run: Train, folder: Path) -> None:
    paint_mask(folder / "masks" / "0.png", (1, 2, 30, 40))  # one that no other test has cached
    dataset = load(folder)
    paint_mask(folder / "masks" / "0.png", (5, 5, 20, 50))
    with pytest.raises(ValueError, match=r"0\.png changed after the dataset was loaded"):
        run(MASKED, dataset=dataset)


def test_a_cancelled_masked_run_continues_to_the_same_bytes(run: Train, folder: Path) -> None:
    dataset = load(folder, flip=True, random_crops=3)
    whole = run(MASKED, dataset=dataset)
    with pytest.raises(Cancelled):
        run(MASKED, where="b", dataset=dataset, on_step=cancel_at(1))
    assert lora_bytes(run(MASKED, where="b", dataset=dataset)) == lora_bytes(whole)


# Random crops


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """Two pictures that are wider than their bucket, with noise on them."""
    folder = tmp_path / "wide"
    folder.mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 110, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"noise {number}")
    return folder


def test_random_crops_lie_inside_and_differ_from_image_to_image(wide: Path) -> None:
    entries = load(wide, random_crops=8).entries
    for entry in entries:
        middle = center_crop(entry.width, entry.height, entry.bucket)
        assert all(0 <= crop.left <= crop.resized_w - crop.bucket_w and crop.top == 0 for crop in entry.crops)
        assert {replace(crop, left=middle.left) for crop in entry.crops} == {middle}
        assert len({crop.left for crop in entry.crops}) >= 3
    assert entries[0].crops != entries[1].crops
    assert load(wide, random_crops=3).entries[0].crops == entries[0].crops[:3]
    assert load(wide).entries[0].crops == (center_crop(110, 64, entries[0].bucket),)


def test_each_crop_has_its_own_latents_and_coordinates_mirrored_when_flipped(
    micro_base: SDXLBase, wide: Path, cache: Path
) -> None:
    data = data_of(micro_base, load(wide, random_crops=4, flip=True), cache)
    samples = data.variants[0]
    assert len(samples) == 8
    for plain, mirrored in zip(samples[::2], samples[1::2], strict=True):
        crop = plain.crop
        assert plain.time_ids()[3] == crop.left
        assert mirrored.time_ids()[3] == crop.resized_w - crop.bucket_w - crop.left
    lefts = {sample.crop.left for sample in samples}
    assert len({sample.latents_file for sample in samples}) == 2 * len(lefts) and len(lefts) > 1
    drawn = {data.batch(PassOfUpdate(step, (0,))).time_ids[0, 3].item() for step in range(60)}
    assert drawn == {sample.time_ids()[3].item() for sample in samples}


def test_random_crops_are_in_the_fingerprint(wide: Path) -> None:
    assert load(wide).fingerprint != load(wide, random_crops=4).fingerprint


# kohya's folders


def lay_kohya(pictures: Path, root: Path, *folders: str) -> Path:
    for number, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        shutil.copy(pictures / f"{number}.png", root / folder / "x.png")
    return root


def test_kohya_folders_give_repeats_and_the_missing_captions(pictures: Path, tmp_path: Path) -> None:
    lay_kohya(pictures, tmp_path, "10_sks dog", "5_cat")
    (tmp_path / "5_cat" / "x.txt").write_text("a grey cat")
    dataset = load(tmp_path, repeats=2, trigger_word="zxq")
    assert [(e.repeats, e.caption) for e in dataset.entries] == [(20, "zxq, sks dog"), (10, "zxq, a grey cat")]
    (problem,) = dataset.problems
    assert "the name of its folder is used, 'sks dog'" in problem.reason and not problem.skipped
    assert "repeats: 1 image x 10, 1 image x 20" in describe(dataset)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ("plain", "is outside the folders with repeats"),
        ("0_zero", "is in 0_zero, which stands for 0 repeats: use 1 to 1000"),
        ("1500_many", "is in 1500_many, which stands for 1500 repeats"),
        ("2024", "is outside the folders with repeats"),
        ("10 dog", "is outside the folders with repeats"),
        ("10_dog/unused", "is in a subfolder of 10_dog: move it to 10_dog"),
        ("_backup/10_dog", "is outside the folders with repeats"),
        ("reg/1_dog", "is outside the folders with repeats"),
    ],
)
def test_what_is_beside_kohya_folders_is_left_out_and_named(
    pictures: Path, tmp_path: Path, other: str, reason: str
) -> None:
    lay_kohya(pictures, tmp_path, "10_dog", "01_cat", other)
    dataset = load(tmp_path)
    assert [(entry.repeats, entry.caption) for entry in dataset.entries] == [(1, "cat"), (10, "dog")]
    (skipped,) = [problem for problem in dataset.problems if problem.skipped]
    assert f"{other}/" in skipped.file and reason in skipped.reason


def test_one_stray_image_leaves_the_repeats_of_kohya_folders(pictures: Path, tmp_path: Path) -> None:
    lay_kohya(pictures, tmp_path, "10_dog", "5_cat")
    for stray in ("preview.png", "unreadable.psd"):
        shutil.copy(pictures / "0.png", tmp_path / stray)
    dataset = load(tmp_path)
    assert sorted(entry.repeats for entry in dataset.entries) == [5, 10]
    assert {Path(p.file).name for p in dataset.problems if p.skipped} == {"preview.png", "unreadable.psd"}


def test_kohya_folders_may_be_in_images(pictures: Path, tmp_path: Path) -> None:
    dataset = load(lay_kohya(pictures, tmp_path, "images/10_dog", "images/5_cat"))
    assert [(entry.repeats, entry.caption) for entry in dataset.entries] == [(10, "dog"), (5, "cat")]


def test_a_kohya_project_has_its_regularisation_images_in_reg(pictures: Path, tmp_path: Path) -> None:
    lay_kohya(pictures, tmp_path, "img/10_ohwx cat", "reg/1_cat", "log/samples")
    dataset = load(tmp_path, trigger_word="ohwx")
    assert [(entry.repeats, entry.caption) for entry in dataset.entries] == [(10, "ohwx cat")]
    assert [(entry.repeats, entry.caption) for entry in dataset.regularisation] == [(1, "cat")]
    (skipped,) = [problem for problem in dataset.problems if problem.skipped]
    assert "log/samples/" in skipped.file


def test_every_image_of_kohya_folders_is_seen_as_often_as_they_say(
    micro_base: SDXLBase, pictures: Path, cache: Path, tmp_path: Path
) -> None:
    data = data_of(micro_base, load(lay_kohya(pictures, tmp_path, "3_dog", "2_cat")), cache)
    seen = Counter(index for step in range(3) for batch in data.micro_batches(step) for index in batch)
    assert sorted(seen.values()) == [2, 3] and seen[[e.repeats for e in data.job.entries].index(3)] == 3
