"""The audit of a dataset: each kind of problem is found where it is, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from sdxl_lora_core.dataset.audit import DatasetAudit, audit
from sdxl_lora_core.dataset.audit_chart import audit_chart
from sdxl_lora_core.dataset.caption_dataset import load_caption_dataset
from sdxl_lora_core.dataset.config import DatasetConfig
from sdxl_lora_core.evaluation.dataset_page import save_audit
from sdxl_lora_core.images.likeness import pixel_vectors, sharpness
from sdxl_lora_core.text.caption_length import caption_length

SUBJECTS = ("cat", "dog", "tree", "house", "river", "bird", "chair", "lamp")


def picture(seed: int, width: int = 96, height: int = 96) -> Image.Image:
    """Noise with coarse shapes, so that no two are alike and each is sharp."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height))
    noise = random.integers(0, 60, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) * 0.75 + noise).astype(np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, subject in enumerate(SUBJECTS):
        add(folder, f"{number}.png", picture(number), f"zxq, a {subject} in the rain")
    return folder


def add(folder: Path, name: str, image: Image.Image, caption: str | bytes) -> None:
    image.save(folder / name)
    text = (folder / name).with_suffix(".txt")
    text.write_bytes(caption if isinstance(caption, bytes) else caption.encode())


def audited(folder: Path, **settings: object) -> DatasetAudit:
    config = DatasetConfig(**{"resolution": 64, "trigger_word": "zxq", **settings})  # type: ignore[arg-type]
    return audit(load_caption_dataset(folder, config), caption_length)


def items(found: DatasetAudit, title: str) -> list[str]:
    return [item.text for finding in found.findings if finding.title.startswith(title) for item in finding.items]


def test_a_clean_dataset_has_only_its_shared_word(folder: Path) -> None:
    found = audited(folder)
    assert [finding.title for finding in found.findings] == ["Words in nearly every caption"]
    assert items(found, "Words") == ["rain: in 8 of 8 captions"]
    assert found.sentences()[0] == "images: 8 images (8 for training)"
    assert found.count("training") == 8 and found.trigger_words == ("zxq",)
    assert not found.terms_are_tags and dict(found.terms) == {"zxq": 8, "rain": 8} | dict.fromkeys(SUBJECTS, 1)
    image = found.images[0]
    assert (image.width, image.height, image.bucket, image.role) == (96, 96, (64, 64), "training")
    assert image.tokens == caption_length("zxq, a cat in the rain")[0] > 6


def blurred(folder: Path) -> None:
    add(folder, "soft.png", picture(50).filter(ImageFilter.GaussianBlur(6)), "zxq, a hill")


def copied(folder: Path) -> None:
    (folder / "copy.png").write_bytes((folder / "3.png").read_bytes())
    (folder / "copy.txt").write_text("zxq, a hill")


def recompressed(folder: Path) -> None:
    add(folder, "again.jpg", picture(3).resize((120, 120)), "zxq, a hill")


def tiny(folder: Path) -> None:
    add(folder, "tiny.png", picture(50, 40, 40), "zxq, a hill")


def long(folder: Path) -> None:
    add(folder, "long.png", picture(50, 400, 100), "zxq, a hill")


def wordy(folder: Path) -> None:
    add(folder, "wordy.png", picture(50), "zxq, " + "very " * 74 + "final words")


def without_trigger(folder: Path) -> None:
    add(folder, "plain.png", picture(50), "a hill")


def garbled(folder: Path) -> None:
    add(folder, "garbled.png", picture(50), "zxq, a cafÃ©")


def legacy(folder: Path) -> None:
    add(folder, "legacy.png", picture(50), "zxq, a café".encode("cp1252"))


def broken(folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "broken.txt").write_text("zxq, a hill")


@pytest.mark.parametrize(
    ("spoil", "title", "texts"),
    [
        (blurred, "Much less sharp", ["soft.png: sharpness"]),
        (copied, "The same file twice", ["3.png and copy.png"]),
        (recompressed, "Nearly the same image", ["3.png and again.jpg"]),
        (tiny, "Smaller than they are trained", ["tiny.png: 40 x 40, trained at 64 x 64"]),
        (long, "Very long or very high", ["long.png: 400 x 100"]),
        (wordy, "Captions cut at 77 tokens", ["wordy.png: 79 tokens, not read:"]),
        (without_trigger, "Captions without the trigger word", ["plain.png: a hill"]),
        (garbled, "Captions in a wrong encoding", ["garbled.png: zxq, a cafÃ©"]),
        (legacy, "Captions in a wrong encoding", ["images/legacy.txt: is not UTF-8 and was read as"]),
        (broken, "Skipped files", ["images/broken.png:"]),
    ],
)
def test_each_problem_is_found(folder: Path, spoil: Callable[[Path], None], title: str, texts: list[str]) -> None:
    before = {finding.title for finding in audited(folder).findings}
    assert not any(known.startswith(title) for known in before)
    spoil(folder)
    found = audited(folder)
    lines = items(found, title)
    assert len(lines) == len(texts) and all(line.startswith(text) for line, text in zip(lines, texts, strict=True))
    others = {finding.title for finding in found.findings} - before
    assert len(others) == 1
    assert any(line.startswith(next(iter(others))) for line in found.sentences())


def test_shared_tags_are_counted_by_caption(folder: Path) -> None:
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"zxq, long hair, solo, {'sky, ' * (number % 2)}standing, sky")
    found = audited(folder)
    assert found.terms_are_tags and dict(found.terms) == dict.fromkeys(
        ("zxq", "long hair", "solo", "standing", "sky"), 8
    )
    assert found.as_json()["tags"]["sky"] == 8


def test_a_duplicate_across_training_and_validation_is_said(folder: Path) -> None:
    for number in range(8):
        add(folder, f"again{number}.jpg", picture(number).resize((120, 120)), "zxq, a hill")
    found = audited(folder, validation_percent=50)
    assert any(
        line.endswith("(one is for training and one for validation)") for line in items(found, "Nearly the same")
    )


def test_where_no_caption_has_the_trigger_word_it_is_meant_to_be_added(folder: Path) -> None:
    assert items(audited(folder, trigger_word="ohwx"), "Captions without") == []


def test_few_captions_fuse_nothing(folder: Path) -> None:
    for number in range(4, 8):
        (folder / f"{number}.png").unlink()
        (folder / f"{number}.txt").unlink()
    assert items(audited(folder), "Words") == []


def test_the_report_is_saved_as_one_page_with_thumbnails(folder: Path, tmp_path: Path) -> None:
    copied(folder)
    blurred(folder)
    found = audited(folder)
    chart = audit_chart(found)
    page = save_audit(found, chart, tmp_path / "datasets", "mine")
    text = page.read_text()
    assert text.count('src="data:image/jpeg;base64,') == 3 and text.count('src="data:image/png;base64,') == 1
    assert "The same file twice" in text and "http" not in text and chart.shape[1:] == (1200, 3)
    assert sorted(path.name for path in page.parent.iterdir()) == ["chart.png", "report.html", "report.json"]
    assert save_audit(found, chart, tmp_path / "datasets", "mine").parent.name == "mine_00002"


def test_cancelling_stops_between_images(folder: Path) -> None:
    def cancel(done: int, total: int) -> None:
        assert (done, total) == (1, 8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(load_caption_dataset(folder, DatasetConfig(resolution=64)), caption_length, cancel)


def test_sharpness_falls_with_blur_and_not_with_size() -> None:
    sharp, large = picture(1), picture(1, 1024, 1024)
    values = [
        sharpness(np.asarray(image.filter(ImageFilter.GaussianBlur(radius))))
        for image in (sharp,)
        for radius in (0, 1, 3)
    ]
    assert values[0] > 3 * values[1] > 9 * values[2] > 0
    assert sharpness(np.asarray(large)) > 0 and sharpness(np.zeros((1, 1, 3), np.uint8)) == 0


def test_pixel_vectors_are_correlations() -> None:
    images = [np.asarray(picture(1)), np.asarray(picture(1).resize((200, 200))), np.asarray(picture(2))]
    products = pixel_vectors(images) @ pixel_vectors(images).T
    assert products.diagonal() == pytest.approx(1) and products[0, 1] > 0.98 and abs(products[0, 2]) < 0.7
    assert not pixel_vectors([np.full((8, 8, 3), 7, np.uint8)]).any()
