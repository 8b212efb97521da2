"""`sdxl-lora generate`, `compare`, `score` and `report` on small models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl_lora_core.cli.evaluate import _lora
from sdxl_lora_core.cli.main import main
from sdxl_lora_core.generation.generate import generate
from sdxl_lora_core.generation.job import GenerationContext, GenerationJob
from sdxl_lora_core.sdxl.base import SDXLBase
from tests.micro import vision
from tests.micro.images import SHARED, settings, write_lora
from tools.run_workflow import ROOT

CLIP = ROOT / "assets/tiny-clip"
SMALL = ["--set", "width=64", "--set", "height=64", "--set", "steps=2", "--device", "cpu", "--precision", "fp32"]


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


@pytest.mark.slow
def test_generate_writes_what_generation_makes(
    micro_base: SDXLBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = write_lora(tmp_path / "style.safetensors", micro_base, seed=1)
    where = ["--output", tmp_path, "--home", tmp_path / "home"]
    arguments = ["generate", micro_base.path, "--prompt", "one", "--prompt", "two", "--lora", f"{lora.path}:0.5"]
    first = call(capsys, *arguments, *where, *SMALL, "--set", "seed=5")
    again = call(capsys, *arguments, *where, *SMALL, "--set", "seed=5")
    assert first.count("seed 5") == 2 and "cache" not in first and again.count("from the cache") == 2
    config = settings(prompt="one\ntwo", prompt_per_line=True, steps=2)
    images = generate(GenerationJob(micro_base, config, [_lora(f"{lora.path}:0.5")]), GenerationContext(SHARED))
    for number, image in enumerate(images):
        saved = Image.open(tmp_path / f"images/generated/{number:05d}.png")
        assert np.array_equal(np.asarray(saved), image.pixels) and "parameters" in saved.info
    assert (tmp_path / "images/generated_00002/00001.png").exists()


@pytest.mark.slow
def test_compare_saves_a_report(micro_base: SDXLBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = write_lora(tmp_path / "own.safetensors", micro_base, seed=1)
    (tmp_path / "own").mkdir()
    write_lora(tmp_path / "own/step-000010.safetensors", micro_base, seed=2)
    references = tmp_path / "references"
    references.mkdir()
    for number, pixels in enumerate(vision.pictures(2, 64, 64)):
        Image.fromarray(pixels).save(references / f"{number}.png")
    text = call(
        capsys,
        *("compare", micro_base.path, "--prompt", "one", "--prompt", "two", "--lora", own.path, *SMALL),
        *("--columns", "checkpoint: all", "--clip-model", CLIP),
        *("--image-model", CLIP, "--references", references, "--output", tmp_path, "--home", tmp_path / "home"),
    )
    page = tmp_path / "comparisons/comparison/report.html"
    assert text.splitlines()[-1] == str(page) and page.exists() and text.startswith("CLIP score (tiny-clip):")
    report = json.loads(page.with_name("report.json").read_text())
    assert [variant["name"] for variant in report["variants"]] == ["base", "checkpoint 10", "checkpoint last"]
    assert list(report["metrics"]) == ["clip_score", "similarity"]


def test_score_prints_the_scores_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, pixels in enumerate(vision.pictures(2, 64, 64)):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    (tmp_path / "0.txt").write_text("a red circle")
    tagger = vision.classifier(tmp_path / "tagger", ["red", "blue"])
    document = json.loads(call(capsys, "score", tmp_path, "--clip-model", CLIP, "--device", "cpu"))
    assert document["files"] == ["0.png"] and document["scores"][0]["prompt"] == "a red circle"
    both = json.loads(
        call(
            capsys,
            *("score", tmp_path, "--clip-model", CLIP, "--prompt", "red, blue", "--tagger", tagger),
            *("--set", "tag_threshold=0.01", "--image-model", CLIP, "--device", "cpu"),
        )
    )
    assert both["files"] == ["0.png", "1.png"] and both["scores"][1]["tags_found"] == ["red", "blue"]
    assert both["similarity"]["images"] == 2 and both["similarity"]["diversity"] > 0


def test_report_saves_the_audit_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ROOT / "assets/sample-dataset"
    text = call(capsys, "report", folder, "--output", tmp_path, "--set", "resolution=128", "--save-as", "mine")
    assert text.startswith("sample-dataset: 24 images (24 for training)")
    assert Path(text.splitlines()[-1]) == tmp_path / "datasets/mine/report.html"
    assert json.loads((tmp_path / "datasets/mine/report.json").read_text())["images"][0]["bucket"] == [128, 128]


@pytest.mark.parametrize(
    ("text", "path", "strengths"),
    [
        ("a.safetensors", "a.safetensors", (1, 1)),
        ("a.safetensors:0.5", "a.safetensors", (0.5, 0.5)),
        ("a.safetensors:0.5:0", "a.safetensors", (0.5, 0)),
        ("C:/loras/a.safetensors:-1", "C:/loras/a.safetensors", (-1, -1)),
    ],
)
def test_loras_with_strengths(text: str, path: str, strengths: tuple[float, float]) -> None:
    lora = _lora(text)
    assert lora.path == Path(path) and (lora.strength_model, lora.strength_clip) == strengths


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "nowhere", "--prompt", "x"], "nowhere"),
        (["score", "nowhere", "--clip-model", str(CLIP)], "the dataset folder 'nowhere' does not exist"),
        (["report", str(ROOT / "assets/sample-dataset"), "--set", "size=1"], "unknown setting size"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(arguments)
