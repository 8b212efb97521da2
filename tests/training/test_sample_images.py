"""Samples while a run trains: the pictures that generation gives, scored, and never a part in the training."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_lora_core.cli.run_file import read_run
from sdxl_lora_core.dataset.caption_dataset import with_validation
from sdxl_lora_core.generation.job import GenerationContext, GenerationJob
from sdxl_lora_core.lora.stack import LoRARef
from sdxl_lora_core.runtime.loaded_parts import LoadedParts
from sdxl_lora_core.sdxl.base import SDXLBase
from sdxl_lora_core.training import loop
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.monitor import sample_images
from sdxl_lora_core.training.monitor.charts import plot_losses
from sdxl_lora_core.training.monitor.progress import StepReport
from sdxl_lora_core.training.monitor.sample_images import SampleRenderer
from sdxl_lora_core.training.run.loop_state import Evaluation, LoopState
from sdxl_lora_core.training.run.runs import run_fingerprint
from tests.micro.images import draw, settings
from tests.micro.runs import CPU, SMALL, Cancelled, Train, Trained, cancel_at, load, lora_bytes
from tools.run_workflow import ROOT

CLIP = str(ROOT / "assets/tiny-clip")
SAMPLED = replace(SMALL, sample_prompts=("one", "two"), sample_steps=2, sample_every=2)


def chosen(**changes: Any) -> TrainConfig:
    return replace(SAMPLED, keep_best="clip_score", clip_model=CLIP, **changes)


def samples_folder(tmp_path: Path, where: str = "a") -> Path:
    return tmp_path / where / "runs" / "small" / "samples"


def drawn(base: SDXLBase, lora: Path, **changes: Any) -> list[np.ndarray]:
    """What SDXLGenerateCached draws with a LoRA file."""
    request = settings(
        prompt="one\ntwo", prompt_per_line=True, seed=SMALL.seed, **{"steps": 2, "guidance": 7.0, **changes}
    )
    reference = LoRARef(lora, "lora", 1.0, 1.0)
    return [image.pixels for image in draw(base, request, [reference], parts=LoadedParts(CPU))]


def test_a_sample_is_what_generation_draws_with_the_file_of_that_step(trained: Trained, micro_base: SDXLBase) -> None:
    result, shorter = trained(SAMPLED), trained(replace(SMALL, steps=2))
    samples = result.loss_chart.with_name("samples")
    for step, lora in ((2, shorter.lora_path), (4, result.lora_path)):
        for number, expected in enumerate(drawn(micro_base, lora)):
            picture = Image.open(samples / f"step-{step:06d}-{number:02d}.png")
            assert np.array_equal(np.asarray(picture), expected)
    assert all(map(np.array_equal, result.samples, drawn(micro_base, result.lora_path)))
    names = [path.name for path in samples.iterdir() if path.suffix == ".safetensors"]
    assert names == [], "the LoRA that it drew with is gone"


def test_sampling_changes_no_byte_and_no_random_state(run: Train, trained: Trained) -> None:
    plain = trained()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert lora_bytes(run(replace(SAMPLED, sample_every=1), where="b")) == lora_bytes(plain)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("change", [{"sample_steps": 3}, {"sample_guidance": 2.0}], ids=str)
def test_how_samples_are_drawn(run: Train, micro_base: SDXLBase, change: dict[str, Any]) -> None:
    result = run(replace(SAMPLED, sample_every=0, **change))
    asked = {name.removeprefix("sample_"): value for name, value in change.items()}
    assert all(map(np.array_equal, result.samples, drawn(micro_base, result.lora_path, **asked)))
    assert not np.array_equal(result.samples[0], drawn(micro_base, result.lora_path)[0])


def test_scores(run: Train, trained: Trained, tmp_path: Path) -> None:
    result = run(replace(SAMPLED, clip_model=CLIP))
    with (samples_folder(tmp_path) / "samples.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["image"], row["prompt"]) for row in rows] == [
        ("2", "step-000002-00.png", "one"),
        ("2", "step-000002-01.png", "two"),
        ("4", "step-000004-00.png", "one"),
        ("4", "step-000004-01.png", "two"),
    ]
    assert [float(row["clip_score"]) for row in rows[2:]] == pytest.approx(result.report.clip_scores)
    assert trained(SAMPLED).report.clip_scores is None


def scripted(monkeypatch: pytest.MonkeyPatch, *scores: float) -> None:
    remaining = iter(scores)
    monkeypatch.setattr(SampleRenderer, "scores", lambda self, pixels, device: (next(remaining), 0.0))


def test_the_file_holds_the_step_with_the_best_score(run: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, 10.0, 30.0, 20.0, 0.0)
    result = run(chosen(steps=5))
    assert "has the adapter of step 4, the best by clip_score" in result.report.kept
    assert lora_metadata_steps(result.lora_path) == "4"


def lora_metadata_steps(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()["ss_steps"]


def test_a_choice_by_score_survives_a_cancel(run: Train, trained: Trained) -> None:
    """Once after a step, once while it draws."""
    whole = trained(chosen())
    with pytest.raises(Cancelled):
        run(chosen(), on_step=cancel_at(1))

    def cancel_drawing(report: StepReport) -> None:
        if report.phase == "generating samples" and report.done == 1:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(chosen(), on_step=cancel_drawing)
    assert lora_bytes(run(chosen())) == lora_bytes(whole)


def test_samples_that_fail_do_not_end_the_run(
    run: Train, trained: Trained, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = trained()
    original = sample_images.generate

    def fail(job: GenerationJob, context: GenerationContext) -> Any:
        if job.config.cache == "off":
            raise ValueError("the UNet returned values that are not finite")
        return original(job, context)

    monkeypatch.setattr(sample_images, "generate", fail)
    assert lora_bytes(run(SAMPLED, where="b")) == lora_bytes(plain)
    assert "no samples at step 2: the UNet returned values that are not finite" in caplog.text


def test_the_unet_leaves_the_device_while_samples_are_drawn(run: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """No second UNet lies beside it: it goes to the CPU before the first part of generation is loaded."""
    events: list[str] = []
    original = loop.Loop.__init__

    def watched(self: loop.Loop, *arguments: Any) -> None:
        original(self, *arguments)
        move = self.model.to
        monkeypatch.setattr(
            self.model, "to", lambda device: events.append(f"to {device}") or move(device), raising=False
        )

    monkeypatch.setattr(loop.Loop, "__init__", watched)
    borrow = LoadedParts.borrow
    monkeypatch.setattr(
        LoadedParts, "borrow", lambda self, request: events.append(request.name) or borrow(self, request)
    )
    run(replace(SAMPLED, sample_prompts=("one",), sample_every=4))
    first, last = events.index("to cpu"), len(events) - events[::-1].index("to cpu") - 1
    assert first < events.index("unet") < last


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep_best": "clip_score", "sample_every": 5, "clip_model": "x"}, "'clip_score' and sample_prompts is empty"),
        ({"keep_best": "clip_score"}, "keep_best is 'clip_score', sample_every is 0 and clip_model is ''"),
    ],
)
def test_what_needs_samples_is_refused_without(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainConfig(**settings)


def test_a_missing_clip_model_is_found_before_anything_is_trained(run: Train, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        run(replace(SAMPLED, clip_model=str(tmp_path / "nowhere")), on_step=lambda report: pytest.fail("began"))


def test_sampling_is_outside_the_fingerprint_unless_it_decides(micro_base: SDXLBase, pictures: Path) -> None:
    def fingerprint(config: TrainConfig) -> str:
        return run_fingerprint(micro_base, load(pictures), config)

    assert fingerprint(SAMPLED) == fingerprint(replace(SAMPLED, sample_every=3, clip_model=CLIP, sample_steps=9))
    deciding = [chosen(), chosen(sample_every=3), chosen(sample_steps=9)]
    assert len({fingerprint(SAMPLED), *map(fingerprint, deciding)}) == 4


@pytest.fixture
def others(tmp_path: Path) -> Path:
    folder = tmp_path / "others"
    folder.mkdir()
    Image.new("RGB", (64, 64), "purple").save(folder / "held.png")
    (folder / "held.txt").write_text("a purple square")
    return folder


def test_a_second_dataset_is_validated_with_and_not_trained_on(
    run: Train, trained: Trained, pictures: Path, others: Path, tmp_path: Path
) -> None:
    plain = trained()
    result = run(where="b", validation=load(others))
    assert lora_bytes(result) == lora_bytes(plain)
    assert result.report.validation_loss is not None and plain.report.validation_loss is None
    both = run(
        replace(SMALL, steps=1), where="c", dataset=load(pictures, validation_percent=20), validation=load(others)
    )
    assert both.report.validation_loss_before != result.report.validation_loss_before
    dataset = read_run(tmp_path / "b" / "runs" / "small" / "run.yaml", None).dataset
    assert [entry.image.name for entry in dataset.validation] == ["held.png"]
    assert len(dataset.entries) == 5


def test_a_picture_is_not_validated_with_if_it_is_trained_on(pictures: Path) -> None:
    with pytest.raises(ValueError, match=r"5 images of the validation dataset are also trained on, such as 0\.png"):
        with_validation(load(pictures), load(pictures))


@pytest.mark.slow
def test_a_chart_of_everything_is_drawn(tmp_path: Path) -> None:
    state = LoopState(
        step=4,
        losses=[0.5, float("nan"), 0.3, 0.2],
        learning_rates=[1e-4] * 4,
        checkpoints=[2, 4],
        looks=[Evaluation(0, 0.4), Evaluation(2, 0.3, (20.0, 30.0)), Evaluation(4, 0.2, (30.0, 31.0))],
    )
    plot_losses(tmp_path / "with.png", "a run", state)
    plot_losses(tmp_path / "without.png", "a run", replace_looks(state))
    plot_losses(tmp_path / "kept.png", "a run", state, kept=2)
    drawn, without, kept = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("with", "without", "kept"))
    assert drawn.shape == without.shape == kept.shape
    assert not np.array_equal(drawn, without) and not np.array_equal(drawn, kept)


def replace_looks(state: LoopState) -> LoopState:
    return replace(state, looks=[Evaluation(0, 0.4)])


def test_long_sample_prompts_are_read_as_long_captions_are(run: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    original = sample_images.generate
    monkeypatch.setattr(
        sample_images,
        "generate",
        lambda job, context: seen.append(job.config.long_prompts) or original(job, context),
    )
    for chunks in (1, 2):
        run(replace(SMALL, steps=1, caption_chunks=chunks, sample_prompts=("one",), sample_steps=1), where=str(chunks))
    assert seen == ["cut", "chunks"]
