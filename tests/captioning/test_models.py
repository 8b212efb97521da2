"""Captioning models and taggers, against transformers' own way of using them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_lora_core.captioning.captioner import Loaders, open_captioner
from sdxl_lora_core.captioning.config import CaptionConfig
from sdxl_lora_core.captioning.models import load_captioner
from sdxl_lora_core.captioning.taggers import as_words, wd_input
from tests.micro.captioners import (
    write_blip,
    write_blip_2,
    write_classifier,
    write_florence,
    write_onnx_tagger,
    write_pictures,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_blip(root / "blip")
    write_blip_2(root / "blip-2")
    write_blip_2(root / "blip-2-t5", with_t5=True)
    write_florence(root / "florence")
    write_onnx_tagger(root / "wd")
    write_classifier(root / "classifier")
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in write_pictures(tmp_path_factory.mktemp("images"))]


def captions(folder: Path, images: list[np.ndarray], loaders: Loaders | None = None, **settings: Any) -> list[str]:
    captioner = open_captioner(folder, CaptionConfig(**{"beams": 1, **settings}), CPU, loaders)
    assert captioner.name == folder.name
    captioner.open()
    return captioner.captions([str(number) for number in range(len(images))], images)


def own_way(folder: Path, image: np.ndarray, text: str | None, **options: Any) -> str:
    """What transformers' documentation does."""
    import transformers

    from sdxl_lora_core.vision.model_folder import load_processor

    model: Any = load_captioner(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    kinds = {"blip": "BlipProcessor", "blip-2": "Blip2Processor", "florence2": "Florence2Processor"}
    kind: Any = getattr(transformers, kinds[model.config.model_type])
    queries = {"num_query_tokens": model.config.num_query_tokens} if model.config.model_type == "blip-2" else {}
    processor = kind(load_processor(folder, model), tokenizer, **queries)
    inputs = processor(images=Image.fromarray(image), text=text, return_tensors="pt")
    return processor.decode(model.generate(**inputs, do_sample=False, **options)[0], skip_special_tokens=True).strip()


@pytest.mark.parametrize(("prompt", "text"), [("", None), ("a photo of", "a photo of")])
def test_blip_as_transformers_runs_it(models: Path, images: list[np.ndarray], prompt: str, text: str | None) -> None:
    found = captions(models / "blip", images, prompt=prompt, max_tokens=12)
    assert found == [own_way(models / "blip", image, text, max_new_tokens=12, num_beams=1) for image in images]
    assert len(set(found)) > 1 and all(one.startswith(prompt) for one in found)


@pytest.mark.parametrize(("prompt", "text"), [("", None), ("Question: what?", "Question: what?")])
def test_blip_2_as_transformers_runs_it(models: Path, images: list[np.ndarray], prompt: str, text: str | None) -> None:
    found = captions(models / "blip-2", images[:3], prompt=prompt, max_tokens=10)
    assert found == [own_way(models / "blip-2", image, text, max_new_tokens=10, num_beams=1) for image in images[:3]]
    assert any(found)


def test_blip_2_with_t5_as_transformers_runs_it(models: Path, images: list[np.ndarray]) -> None:
    """T5 has no positions, so no end but the setting's."""
    found = captions(models / "blip-2-t5", images[:2], max_tokens=10)
    own = [own_way(models / "blip-2-t5", image, None, max_new_tokens=10, num_beams=1) for image in images[:2]]
    assert found == own and any(found)
    longer = captions(models / "blip-2-t5", images[:2], max_tokens=20)
    assert longer != found and all(one.startswith(short) for one, short in zip(longer, found, strict=True))


@pytest.mark.parametrize(
    ("detail", "task"),
    [("short", "<CAPTION>"), ("detailed", "<DETAILED_CAPTION>"), ("very_detailed", "<MORE_DETAILED_CAPTION>")],
)
def test_florence_as_transformers_runs_it(models: Path, images: list[np.ndarray], detail: Any, task: str) -> None:
    found = captions(models / "florence", images, detail=detail, max_tokens=10)
    assert found == [own_way(models / "florence", image, task, max_new_tokens=10, num_beams=1) for image in images]


def test_settings_of_a_model_take_effect(models: Path, images: list[np.ndarray]) -> None:
    base = captions(models / "blip", images, max_tokens=12)
    assert captions(models / "blip", images, max_tokens=3) != base
    assert captions(models / "blip", images, max_tokens=12, beams=4) != base
    short, detailed = (
        captions(models / "florence", images, detail=one, max_tokens=10) for one in ("short", "detailed")
    )
    assert short != detailed
    assert [CaptionConfig(detail=detail).tokens for detail in ("short", "detailed", "very_detailed")] == [48, 128, 384]


def test_a_loaded_model_is_used_again(models: Path, images: list[np.ndarray]) -> None:
    loaded = load_captioner(models / "blip")
    asked = []
    loaders = Loaders(model=lambda folder: asked.append(folder) or loaded)
    assert captions(models / "blip", images, loaders) == captions(models / "blip", images)
    assert asked == [models / "blip"]


def solid(*colour: int) -> np.ndarray:
    return np.full((8, 8, 3), colour, dtype=np.uint8)


def test_onnx_tagger_writes_tags_over_their_thresholds_without_ratings(models: Path) -> None:
    """The model sees blue first, and each channel's share of white."""
    images = [solid(0, 0, 255), solid(255, 130, 0), solid(255, 255, 255)]
    assert captions(models / "wd", images) == ["1girl", "^_^, long hair", "1girl, long hair, ^_^, hatsune miku"]
    assert captions(models / "wd", images, tag_threshold=0.6)[1] == "^_^"
    assert captions(models / "wd", images, character_threshold=0.3)[0] == "1girl, hatsune miku"


def test_images_of_a_tagger_are_on_a_white_square() -> None:
    wide = np.zeros((4, 8, 3), dtype=np.uint8)
    wide[:, :, 0] = 200
    found = wd_input(wide, 8)
    assert found.shape == (8, 8, 3) and found.dtype == np.float32
    assert (found[0] == 255).all() and (found[4] == [0, 0, 200]).all()


def test_tags_are_words_and_faces_stay() -> None:
    assert [as_words(tag) for tag in ("long_hair", "^_^", "o_o", "(o)_(o)", "1girl", "x-ray_film")] == [
        "long hair", "^_^", "o_o", "(o)_(o)", "1girl", "x-ray film",
    ]  # fmt: skip


def test_onnx_tagger_with_other_tags_or_without_its_library(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("model.onnx", "selected_tags.csv"):
        (tmp_path / name).write_bytes((models / "wd" / name).read_bytes())
    table = tmp_path / "selected_tags.csv"
    table.write_text(table.read_text().rsplit("\n", 2)[0] + "\n")
    with pytest.raises(ValueError, match="selected_tags.csv has 4 tags and the model 5: copy both"):
        captions(tmp_path, [])
    table.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="lacks the columns name and category"):
        captions(tmp_path, [])
    (tmp_path / "model.onnx").write_bytes(b"no model")
    table.write_bytes((models / "wd" / "selected_tags.csv").read_bytes())
    with pytest.raises(ValueError, match="model.onnx cannot be opened"):
        captions(tmp_path, [])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="is an ONNX model: python -m pip install onnxruntime"):
        captions(models / "wd", [])


def test_classifier_writes_its_labels(models: Path, images: list[np.ndarray]) -> None:
    found = captions(models / "classifier", images, tag_threshold=0.01)
    assert all(sorted(text.split(", ")) == ["long hair", "outdoors", "smile"] for text in found)
    assert captions(models / "classifier", images, tag_threshold=0.99) == [""] * len(images)


def test_other_folders_are_named(models: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config.json: use a folder with a captioning model"):
        open_captioner(tmp_path, CaptionConfig(), CPU)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="a model of type 'llama': use a folder with BLIP, BLIP-2 or Florence-2"):
        open_captioner(tmp_path, CaptionConfig(), CPU)
    config.write_text(json.dumps({"model_type": "florence2", "auto_map": {}}))
    with pytest.raises(ValueError, match="code of its own, which is not run: use the version for transformers"):
        open_captioner(tmp_path, CaptionConfig(), CPU)
    config.write_text(json.dumps({"model_type": "blip"}))
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors"):
        open_captioner(tmp_path, CaptionConfig(), CPU)
    (tmp_path / "vocab.txt").unlink()
    for file in (models / "blip").iterdir():
        if "token" not in file.name and file.name != "vocab.txt":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer \(tokenizer.json, "):
        open_captioner(tmp_path, CaptionConfig(), CPU)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="the tokenizer in .* cannot be used"):
        open_captioner(tmp_path, CaptionConfig(), CPU).open()


def test_a_model_never_writes_more_than_it_has_positions_for(models: Path, images: list[np.ndarray]) -> None:
    assert captions(models / "blip", images[:1], max_tokens=1024) == captions(
        models / "blip", images[:1], max_tokens=62
    )
