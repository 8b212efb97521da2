"""The node Dataset Images: a folder's images and captions as a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdxl_lora_core.dataset.caption_dataset import CaptionDataset, load_caption_dataset
from sdxl_lora_core.dataset.config import DatasetConfig
from tools.run_workflow import load_pack

NODE: Any = load_pack().NODE_CLASS_MAPPINGS["DatasetImages"]
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CaptionDataset:
    """A wide, a tall and a square image of one colour each; the middle third of the wide one is green."""
    monkeypatch.setenv("SDXL_LORA_HOME", str(tmp_path / "home"))
    folder = tmp_path / "images"
    folder.mkdir()
    wide = Image.new("RGB", (96, 32), RED)
    wide.paste(GREEN, (32, 0, 64, 32))
    for name, image in (("a", wide), ("b", Image.new("RGB", (32, 96), BLUE)), ("c", Image.new("RGB", (64, 64), RED))):
        image.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"caption {name}", encoding="utf-8")
    return load_caption_dataset(folder, DatasetConfig(resolution=64, trigger_word="ohwx"))


def test_images_are_squares_of_their_centres_in_the_order_of_their_captions(dataset: CaptionDataset) -> None:
    images, captions, count = NODE().images(dataset, 32, 0)["result"]
    assert images.shape == (3, 32, 32, 3) and count == 3
    assert captions.splitlines() == ["ohwx, caption a", "ohwx, caption b", "ohwx, caption c"]
    middle = [tuple((image[16, 16] * 255).int().tolist()) for image in images]
    assert middle == [GREEN, BLUE, RED]
    assert tuple(images[0][16, 2].tolist()) == (0, 1, 0), "a third of the wide image is left"


def test_count_takes_the_first_ones(dataset: CaptionDataset) -> None:
    shown = NODE().images(dataset, 64, 2)
    images, captions, count = shown["result"]
    assert images.shape == (2, 64, 64, 3) and count == 2 and len(captions.splitlines()) == 2
    assert shown["ui"]["text"][0].startswith("2 images of 64 x 64 pixels\n")
    assert len(shown["ui"]["images"]) == 2
