"""What a run shows while it trains, and what that decides: early stopping, the best adapter."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.evaluator import Evaluator
from sdxl_lora_core.training.loop import Loop
from sdxl_lora_core.training.monitor.progress import Meter, Smoothing, StepReport
from sdxl_lora_core.training.monitor.validation import best_evaluation, converged
from sdxl_lora_core.training.run.checkpoints import Checkpoints
from sdxl_lora_core.training.run.loop_state import Evaluation
from sdxl_lora_core.training.run.runs import run_fingerprint
from sdxl_lora_core.training.train import TrainResult
from tests.micro.runs import CPU, SMALL, Cancelled, Train, Trained, cancel_at, load, lora_bytes, weights

WATCHED = replace(SMALL, steps=6, validate_every=2)


def run_folder(tmp_path: Path, where: str = "a") -> Path:
    return tmp_path / where / "runs" / "small"


def rows(tmp_path: Path, where: str = "a") -> list[dict[str, str]]:
    return read_rows(run_folder(tmp_path, where))


def rows_of(result: TrainResult) -> list[dict[str, str]]:
    return read_rows(result.loss_chart.parent)


def read_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def scripted(monkeypatch: pytest.MonkeyPatch, *losses: float) -> None:
    """The held-out losses before training and at each validation of WATCHED."""
    values = {2 * number: loss for number, loss in enumerate(losses)}
    monkeypatch.setattr(Evaluator, "validation_loss", lambda self, on_step: values[self.state.step])


def test_the_average_is_adams_without_bias() -> None:
    smoothing, values, decay = Smoothing(10), [3.0, 1.0, 4.0, 1.5], 0.9
    course = [smoothing.add(value) for value in values]
    weights = [(1 - decay) * decay ** (3 - i) for i in range(4)]
    expected = sum(w * v for w, v in zip(weights, values, strict=True)) / (1 - decay**4)
    assert course[0] == pytest.approx(3.0) and course[-1] == pytest.approx(expected)


def test_a_resumed_meter_goes_on_smoothing() -> None:
    whole, losses = Smoothing(), [1.0, 0.5, 0.8]
    expected = [whole.add(loss) for loss in losses][-1]
    meter = Meter(losses[:2], CPU)
    with meter.update(4):
        pass
    report = meter.report(3, 10, losses[2], 1e-4)
    assert report.smoothed == expected
    assert report.images_per_second and report.memory and report.memory > 2**20
    assert report.seconds_left is not None and report.seconds_left >= 0


def test_the_line_of_numbers() -> None:
    report = StepReport("training", 3, 10, 0.5, 0.25, 1e-4, 1.5, 12_300_000_000, 3725)
    assert report.detail == "loss 0.2500, lr 1.00e-04, 1.50 images/s, 12.3 GB, 1:02:05 left"
    assert StepReport("encoding images", 1, 2).detail == ""


def test_every_step_is_reported_with_all_its_numbers_which_are_on_disk_by_then(run: Train, tmp_path: Path) -> None:
    seen: list[StepReport] = []
    counts: list[int] = []

    def on_step(report: StepReport) -> None:
        seen.append(report)
        if report.phase == "training":
            counts.append(len(rows(tmp_path)))

    run(on_step=on_step)
    assert counts == [1, 2, 3, 4]
    training = [report for report in seen if report.phase == "training"]
    assert [report.done for report in training] == [1, 2, 3, 4]
    assert all("images/s" in report.detail and "left" in report.detail for report in training)
    assert training[-1].seconds_left == 0


def test_metrics_of_a_resumed_run_hold_each_step_once(
    run: Train, trained: Trained, pictures: Path, tmp_path: Path
) -> None:
    """Whatever a crash left behind the checkpoint is gone, and what the file has lost comes from the state."""
    config, dataset = replace(WATCHED, checkpoint_every=1), load(pictures, validation_percent=20)
    whole = rows_of(trained(config, validation_percent=20))
    with pytest.raises(Cancelled):
        run(config, dataset=dataset, on_step=cancel_at(3))
    file = run_folder(tmp_path) / "metrics.csv"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:3] + lines[4:]) + "4,9,9,9,,1,1\n5,9")
    run(config, dataset=dataset)
    resumed = rows(tmp_path)
    exact = ("step", "loss", "smoothed", "learning_rate", "validation_loss")
    assert [[row[name] for name in exact] for row in resumed] == [[row[name] for name in exact] for row in whole]
    assert [row["step"] for row in resumed] == ["0", "1", "2", "3", "4", "5", "6"]
    assert [row["step"] for row in resumed if row["validation_loss"]] == ["0", "2", "4", "6"]
    assert resumed[1]["images_per_second"] == lines[2].split(",")[5]


def test_a_disk_that_refuses_metrics_and_chart_does_not_end_the_run(
    run: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("metrics.csv", "loss.png"):
        (run_folder(tmp_path) / name).mkdir(parents=True)
    result = run()
    assert result.lora_path.exists()
    assert caplog.text.count("the metrics are not complete") == 1 and "the chart could not be written" in caplog.text


def test_validation_falls_where_it_is_asked_for_and_changes_no_byte(trained: Trained) -> None:
    plain, often = (trained(replace(WATCHED, validate_every=every), validation_percent=20) for every in (0, 2))
    assert [row["step"] for row in rows_of(plain) if row["validation_loss"]] == ["0", "6"]
    assert [row["step"] for row in rows_of(often) if row["validation_loss"]] == ["0", "2", "4", "6"]
    assert lora_bytes(often) == lora_bytes(plain)


def test_early_stopping_waits_for_its_patience(run: Train, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load(pictures, validation_percent=20)
    scripted(monkeypatch, 0.1, 0.9, 0.8, 0.8, math.nan, 0.7)
    config = replace(WATCHED, steps=10)
    whole = run(replace(config, early_stopping=3), dataset=dataset)
    assert whole.report.steps == 10
    result = run(replace(config, early_stopping=2), where="b", dataset=dataset)
    assert result.report.steps == 8
    assert "stopped early after 8 of 10 steps: 2 validations in a row" in result.report.early_stopping
    assert weights(result) != weights(whole)


def test_the_file_holds_the_best_step(run: Train, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load(pictures, validation_percent=20)
    scripted(monkeypatch, 0.1, 0.9, 0.5, 0.5)
    result = run(replace(WATCHED, keep_best="validation_loss"), dataset=dataset)
    assert "has the adapter of step 4" in result.report.kept
    assert result.report.validation_loss == 0.5 and result.report.steps == 6
    shorter = run(replace(WATCHED, steps=4), where="b", dataset=dataset)
    tensors = [torch_file(path.lora_path) for path in (result, shorter)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[1])


def torch_file(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.parametrize("checkpoint_every", [1, 100])
def test_best_and_patience_survive_cancels_wherever_they_fall(
    run: Train, pictures: Path, monkeypatch: pytest.MonkeyPatch, checkpoint_every: int
) -> None:
    """Cancelled after an update, within a validation, and killed without a checkpoint of its own."""
    dataset = load(pictures, validation_percent=20)
    scripted(monkeypatch, 0.1, 0.5, 0.9, 0.9, 0.9)
    config = replace(
        WATCHED, steps=20, keep_best="validation_loss", early_stopping=2, checkpoint_every=checkpoint_every
    )
    whole = run(config, where="whole", dataset=dataset)
    assert "has the adapter of step 2" in whole.report.kept

    def within(step: int) -> Any:
        def validation_loss(self: Evaluator, on_step: Any) -> float:
            if self.state.step == step:
                raise Cancelled
            return {0: 0.1, 2: 0.5}.get(self.state.step, 0.9)

        return validation_loss

    for step in (2, 4):
        with monkeypatch.context() as patch, pytest.raises(Cancelled):
            patch.setattr(Evaluator, "validation_loss", within(step))
            run(config, dataset=dataset)
    with pytest.raises(Cancelled):
        run(config, dataset=dataset, on_step=cancel_at(5))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", lambda *_: None)
        run(config, dataset=dataset, on_step=kill)
    resumed = run(config, dataset=dataset)
    assert lora_bytes(resumed) == lora_bytes(whole)
    seen = ("kept", "early_stopping", "validation_loss", "validation_loss_before", "loss", "steps")
    assert [getattr(resumed.report, name) for name in seen] == [getattr(whole.report, name) for name in seen]


def kill(report: StepReport) -> None:
    raise KeyboardInterrupt


def test_a_look_before_training_neither_stops_nor_is_kept() -> None:
    config = TrainConfig(validate_every=1, early_stopping=1, keep_best="validation_loss")
    looks = [Evaluation(0, 0.1), Evaluation(1, 0.3)]
    assert not converged(config, looks) and best_evaluation(config, looks) == looks[1]
    assert converged(config, [*looks, Evaluation(2, 0.3)])
    assert best_evaluation(
        config, [*looks, Evaluation(2, math.nan), Evaluation(3, 0.2), Evaluation(4, 0.2)]
    ) == Evaluation(3, 0.2)
    assert best_evaluation(config, [Evaluation(1, math.nan)]) is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"early_stopping": 2}, "early_stopping is 2 and validate_every is 0"),
        ({"keep_best": "validation_loss"}, "keep_best is 'validation_loss' and validate_every is 0"),
    ],
)
def test_what_needs_validation_is_refused_without(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainConfig(**settings)


def test_validation_without_held_out_images_is_refused(run: Train) -> None:
    with pytest.raises(ValueError, match="validate_every is 2 and no image is held out"):
        run(WATCHED)


def test_looking_is_outside_the_fingerprint_unless_it_decides(micro_base: Any, pictures: Path) -> None:
    dataset = load(pictures, validation_percent=40)
    base = replace(SMALL, validate_every=2)

    def fingerprint(**changes: Any) -> str:
        return run_fingerprint(micro_base, dataset, replace(base, **changes))

    assert fingerprint() == fingerprint(validate_every=3) == fingerprint(tensorboard="off", checkpoint_every=1)
    deciding = {"keep_best": "validation_loss"}
    assert len({fingerprint(), fingerprint(**deciding), fingerprint(**deciding, validate_every=3)}) == 3
    other = replace(dataset, validation=dataset.validation[:1])
    config = replace(base, early_stopping=1)
    assert run_fingerprint(micro_base, other, config) != run_fingerprint(micro_base, dataset, config)
    assert run_fingerprint(micro_base, other, base) == fingerprint()


def test_event_files_are_written_unless_turned_off(run: Train, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(Cancelled):
        run(on_step=cancel_at(2))
    run()
    events = EventAccumulator(str(run_folder(tmp_path) / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    expected = [float(row["loss"]) for row in rows(tmp_path)]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(expected)
    run(replace(SMALL, tensorboard="off"), where="b")
    assert not (run_folder(tmp_path, "b") / "tensorboard").exists()


def test_checkpoints_fall_where_they_are_asked_for(run: Train, tmp_path: Path) -> None:
    run(replace(SMALL, steps=5, checkpoint_every=2))
    folder = run_folder(tmp_path) / "checkpoints"
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-000004", "step-000005"]


@pytest.mark.usefixtures("real_charts")
def test_the_chart_is_drawn_while_it_runs(run: Train, tmp_path: Path) -> None:
    sizes: list[tuple[int, int]] = []

    def on_step(report: StepReport) -> None:
        if report.phase == "training" and report.done == 3:
            sizes.append(Image.open(run_folder(tmp_path) / "loss.png").size)

    run(replace(SMALL, checkpoint_every=2), on_step=on_step)
    assert sizes == [(960, 540)]


def test_a_lora_that_a_cancel_came_before_is_kept_by_the_resumed_run(
    run: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where losses are read one step late, the next step has run when the report of a step is cancelled."""
    monkeypatch.setattr(Loop, "late", 1)
    config = replace(SMALL, steps=5, save_every=2)
    kept = sorted(path.name for path in run(config, where="b").lora_path.parent.rglob("*.safetensors"))
    with pytest.raises(Cancelled):
        run(config, on_step=cancel_at(1))
    resumed = run(config)
    assert len(kept) == 3
    assert sorted(path.name for path in resumed.lora_path.parent.rglob("*.safetensors")) == kept
