"""The evaluating nodes on the bundled models: what they output, refuse and pass on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.micro import vision
from tools.run_workflow import ROOT, load_pack

PACK: Any = load_pack()
NODES: Any = PACK.NODE_CLASS_MAPPINGS
CLIP, SAMPLE, STYLE = "tiny-clip (bundled)", "sample: 8-bit (bundled)", "8bit_style (bundled)"
SMALL = {"seed": 1, "count": 1, "steps": 1, "guidance": 1.0, "width": 64, "height": 64, "clip_model": CLIP}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDXL_LORA_HOME", str(tmp_path))
    return tmp_path


def call(node: str, **inputs: Any) -> Any:
    shown = getattr(NODES[node](), NODES[node].FUNCTION)(**inputs)
    return shown["result"] if isinstance(shown, dict) else shown


def said(node: str, **inputs: Any) -> str:
    return getattr(NODES[node](), NODES[node].FUNCTION)(**inputs)["ui"]["text"][0]


def nothing(value: Any) -> bool:
    return isinstance(value, PACK.nodes.host.comfy.Nothing)


def batch(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.stack(vision.pictures(count, 64, 64, seed))).float() / 255


def dataset(percent: int = 25) -> Any:
    return call("LoadCaptionDataset", folder=SAMPLE, trigger_word="", resolution=64, validation_percent=percent)[0]


@pytest.fixture(scope="module")
def base() -> Any:
    return call("LoadSDXLBase", base="tiny-sdxl (bundled)", precision="fp32")[0]


def model(home: Path, name: str, make: Callable[[Path], Path]) -> str:
    (home / "models/clip_score").mkdir(parents=True, exist_ok=True)
    make(home / "models/clip_score" / name)
    return name


# CLIP Score


def test_clip_score_sorts_the_very_tensors_and_annotates_them() -> None:
    images = batch(3) * 0.999
    ordered, best, mean, scores, annotated, report = call("CLIPScore", images=images, prompt="a star", clip_model=CLIP)
    order = json.loads(report)["order"]
    assert torch.equal(ordered, images[order]) and torch.equal(best, images[order[:1]])
    assert scores == sorted(scores, reverse=True) and mean == pytest.approx(sum(scores) / 3)
    assert annotated.shape[0] == 3 and annotated.shape[1] > 64 and annotated.shape[2] == 64


def test_clip_score_on_the_papers_scale_and_with_a_tagger(home: Path) -> None:
    images, common = batch(2), {"prompt": "red, cat, long_hair, sword", "clip_model": CLIP}
    plain = json.loads(call("CLIPScore", images=images, **common)[5])
    assert plain["scale"] == "clip_score" and "prompts are lists of tags" in plain["warnings"][-1]
    tagger = model(home, "tagger", lambda folder: vision.classifier(folder, ["red", "long_hair", "cat"]))
    shown = NODES["CLIPScore"]().score(images, **common, tagger=tagger, scale="clipscore_w25", tag_threshold=0.01)
    report = json.loads(shown["result"][5])
    assert report["mean"] == pytest.approx(plain["mean"] / 40, abs=1e-5) == pytest.approx(shown["result"][2], abs=1e-5)
    assert report["mean_tag_recall"] == 1 and report["scores"][0]["tags_unknown"] == ["sword"]
    assert not any("lists of tags" in warning for warning in report["warnings"])
    (table,) = shown["ui"]["sdxl_lora_table"]
    assert [column[0] for column in table["columns"]] == ["rank", "number", "clipscore_w25", "tag_recall", "prompt"]
    assert NODES["CLIPScore"].VALIDATE_INPUTS(clip_model=CLIP, tagger="(none)") is True
    assert "was not found" in NODES["CLIPScore"].VALIDATE_INPUTS(clip_model=CLIP, tagger="other")
    changed = NODES["CLIPScore"].IS_CHANGED(clip_model=CLIP, tagger=tagger)
    (home / "models/clip_score/tagger/config.json").touch()
    assert NODES["CLIPScore"].IS_CHANGED(clip_model=CLIP, tagger=tagger) != changed


# Image Similarity and Distribution Metrics


def test_similarity_without_references_is_diversity_alone() -> None:
    images, scores, mean, diversity, memorised, nearest, report = call(
        "ImageSimilarity", images=batch(3), image_model=CLIP
    )
    assert torch.equal(images, batch(3)) and all(map(nothing, (scores, mean, memorised, nearest)))
    assert diversity > 0 and json.loads(report)["images"] == 3


def test_similarity_finds_copies_of_the_datasets_images() -> None:
    data = dataset()
    copy = torch.from_numpy(np.asarray(Image.open(data.entries[3].image).convert("RGB").resize((64, 64))).copy()) / 255
    images = torch.cat([copy[None], batch(2)])
    ordered, scores, mean, _, memorised, nearest, report = call(
        "ImageSimilarity", images=images, image_model=CLIP, dataset=data
    )
    assert scores == sorted(scores, reverse=True) and mean == pytest.approx(sum(scores) / 3)
    assert memorised == 1 and nearest.shape[0] == 3 and nearest.shape[2] == 128
    assert json.loads(report)["rows"][0]["nearest"] == data.entries[3].image.name


def test_a_reference_that_a_run_was_trained_on_is_refused_by_name(home: Path) -> None:
    data, other = dataset(25), dataset(50)
    run = home / "lora_runs/mine"
    run.mkdir(parents=True)
    import_module(f"{PACK.__name__}.sdxl_lora_core.dataset.trained_images").write_trained_images(run, data)
    (home / "loras").mkdir()
    shutil.copy(ROOT / "assets/loras/8bit_style.safetensors", home / "loras/mine.safetensors")
    for name in ("mine.safetensors", "mine/step-000010.safetensors"):
        with pytest.raises(ValueError, match="of the reference images were trained on: .*png"):
            call("ImageSimilarity", images=batch(2), image_model=CLIP, dataset=other, lora_stack=[(name, 1.0, 1.0)])
    told = said("ImageSimilarity", images=batch(2), image_model=CLIP, dataset=data, lora_stack=[(STYLE, 1.0, 1.0)])
    assert f"It is not known on which images {STYLE} was trained" in told


def test_distribution_metrics_and_the_inception_score(home: Path) -> None:
    classifier = model(home, "classes", lambda folder: vision.classifier(folder, ["a", "b", "c"]))
    cmmd, kid, fid, score, report = call(
        "DistributionMetrics", images=batch(6), image_model=CLIP, references=batch(5, 1), classifier=classifier
    )
    values = json.loads(report)
    assert (values["cmmd"], values["kid"], values["fid"], values["inception_score"]) == (cmmd, kid, fid, score)
    assert cmmd > 0 and fid > 0 and 1 <= score <= 3 and values["references"] == 5
    assert nothing(call("DistributionMetrics", images=batch(6), image_model=CLIP, dataset=dataset())[3])
    with pytest.raises(ValueError, match="there are no references"):
        call("DistributionMetrics", images=batch(6), image_model=CLIP)


# Filter by Score


def filtered(scores: list[float], **settings: Any) -> Any:
    chosen = {"keep": "best", "best": 1, "threshold": 0.0, **settings}
    return call("FilterByScore", images=[batch(3)], scores=scores, **{name: [value] for name, value in chosen.items()})


def test_the_best_images_pass_and_the_others_do_not() -> None:
    accepted, rejected, count, scores = filtered([10.0, 30.0, 20.0], best=2)
    assert torch.equal(accepted, batch(3)[[1, 2]]) and torch.equal(rejected, batch(3)[[0]])
    assert (count, scores) == (2, [30.0, 20.0])
    accepted, rejected, count, scores = filtered([10.0, 30.0, 20.0], keep="threshold", threshold=50.0)
    assert nothing(accepted) and nothing(scores) and len(rejected) == 3 and count == 0
    assert nothing(filtered([1.0, 2.0, 3.0], best=3)[1])


def test_images_and_scores_of_different_numbers_or_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="3 images and 2 scores"):
        filtered([1.0, 2.0])
    with pytest.raises(ValueError, match="different sizes"):
        call(
            "FilterByScore",
            images=[batch(1), torch.zeros(1, 32, 32, 3)],
            scores=[1.0, 2.0],
            keep=["best"],
            best=[1],
            threshold=[0.0],
        )


# Comparing


@pytest.mark.slow
def test_a_comparison_has_grid_chart_images_table_and_page(base: Any, home: Path) -> None:
    stack = [(STYLE, 1.0, 1.0)]
    variants = call("CompareVariant", name="", settings="", lora_stack=[("line_style (bundled)", 0.5, 0.5)])[0]
    variants = call("CompareVariant", name="mine", settings="", variants=variants, images=batch(2))[0]
    inputs = {"base": base, "prompt": "a star\na moon", "columns": "strength: 0.5, 1", "rows": "", "lora_stack": stack}
    more = {"variants": variants, "references": batch(2, 5), "image_model": CLIP, "save_as": "sub/test", **SMALL}
    node = NODES["CompareLoRAs"]()
    shown = node.compare(**inputs, **more)
    grid, chart, images, table, report, best, compared = shown["result"]
    assert [result.variant.name for result in compared.results][-1] == "mine"
    document = json.loads(report)
    names = ["base", "strength 0.5", "strength 1", "line_style (bundled) at 0.5", "mine"]
    assert [variant["name"] for variant in document["variants"]] == names
    assert list(document["metrics"]) == ["clip_score", "similarity"]
    assert len(images) == 10 and torch.equal(images[-2:][0], batch(2)[:1]) and len(table.splitlines()) == 11
    assert grid.shape[0] == chart.shape[0] == 1 and (home / "comparisons/sub/test/report.html").exists()
    assert "8 images, 0 from the cache" in shown["ui"]["text"][0] and "comparisons/sub/test" in shown["ui"]["text"][0]
    means = [row["mean"] for row in document["metrics"]["clip_score"]["table"]]
    wanted: dict[str, Any] = {"strength 0.5": [(STYLE, 0.5, 0.5)], "strength 1": stack, "base": [], "mine": []}
    assert best == wanted.get(names[int(np.argmax(means))], [("line_style (bundled)", 0.5, 0.5)])
    assert "8 images, 8 from the cache" in said("CompareLoRAs", **inputs, **more)
    generated = call(
        "SDXLGenerateCached",
        base=base,
        prompt="a star\na moon",
        negative_prompt="",
        prompt_per_line=True,
        cache="only",
        sampler="dpmpp_2m",
        scheduler="karras",
        lora_stack=[(STYLE, 0.5, 0.5)],
        **{name: SMALL[name] for name in ("seed", "count", "steps", "guidance", "width", "height")},
    )[0]
    assert torch.equal(generated, torch.cat(images[2:4]))


@pytest.mark.slow
def test_a_setting_of_the_comparison_takes_effect(base: Any) -> None:
    inputs = {"base": base, "prompt": "a star", "columns": "", "rows": "", "save_as": "test", **SMALL, "steps": 2}
    keys = {
        json.loads(call("CompareLoRAs", **{**inputs, **change})[4])["variants"][0]["images"][0]["key"]
        for change in (
            {},
            {"negative_prompt": "a moon", "guidance": 4.0},
            {"guidance": 4.0},
            {"sampler": "euler"},
            {"scheduler": "normal"},
            {"seed": 2},
        )
    }
    assert len(keys) == 6


@pytest.mark.slow
def test_the_best_checkpoint_goes_on_in_the_stack(base: Any, home: Path) -> None:
    (home / "loras/mine").mkdir(parents=True)
    shutil.copy(ROOT / "assets/loras/8bit_style.safetensors", home / "loras/mine.safetensors")
    shutil.copy(ROOT / "assets/loras/line_style.safetensors", home / "loras/mine/step-000010.safetensors")
    stack = [(STYLE, 0.5, 0.5), ("mine.safetensors", 0.8, 0.7)]
    inputs = {"base": base, "lora_stack": stack, "prompt": "a star\na moon", "novel_prompt": "a cat", **SMALL}
    more = {"dataset": dataset(), "image_model": CLIP, "save_as": "test"}
    shown = NODES["PickCheckpoint"]().choose(checkpoints="all", **inputs, **more)
    chosen, grid, chart, report = shown["result"]
    document = json.loads(report)
    names = {"checkpoint 10": "mine/step-000010.safetensors", "checkpoint last": "mine.safetensors"}
    assert chosen == [stack[0], (names[document["best"]], 0.8, 0.7)]
    assert list(document["comparison"]["metrics"]) == ["clip_score", "novel", "similarity", "overall"]
    assert document["comparison"]["prompts"] == ["a star", "a moon", "a cat"] and document["memorisation"]["threshold"]
    assert shown["ui"]["text"][0].startswith(f"Best: {document['best']}, ") and chart.shape[2] == 1200
    assert json.loads((home / "comparisons/test/report.json").read_text()) == document and grid.shape[0] == 1
    with pytest.raises(ValueError, match="has no checkpoint '20'; known are 10, all and last"):
        call("PickCheckpoint", checkpoints="20", **inputs, **more)


@pytest.mark.slow
def test_the_best_strength_goes_on_in_the_stack(base: Any) -> None:
    inputs = {"base": base, "lora_stack": [(STYLE, 0.3, 0.2)], "prompt": "a star\na moon", "novel_prompt": ""}
    shown = NODES["FindStrength"]().choose(strengths="0.5, 1", save_as="test", **{**inputs, **SMALL, "count": 2})
    ((name, model, clip),) = shown["result"][0]
    assert name == STYLE and model == clip and f"strength {model:g}" == json.loads(shown["result"][3])["best"]
    assert "Rounds: 1 seed: base, strength 0.5, strength 1" in shown["ui"]["text"][0]


def test_a_dataset_goes_through_its_report(home: Path) -> None:
    data = dataset()
    shown = NODES["DatasetReport"]().report(data, "mine")
    passed, chart, report = shown["result"]
    assert passed is data and chart.shape[2] == 1200 and len(json.loads(report)["images"]) == 24
    assert "saved: datasets/mine/report.html" in shown["ui"]["text"][0]
    assert (home / "datasets/mine/report.html").exists()
