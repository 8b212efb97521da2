"""What a run's folder tells about it, also while it is being written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sdxl_lora_core.training.monitor.history import run_history, runs_of
from tests.micro.runs import SMALL, Train, load

WATCHED = replace(
    SMALL, steps=4, sample_prompts=("one", "two"), sample_every=2, sample_steps=1, validate_every=2, checkpoint_every=2
)


def test_the_history_of_a_run(run: Train, pictures: Path) -> None:
    reports = []
    result = run(WATCHED, dataset=load(pictures, validation_percent=20), on_step=reports.append)
    history = run_history(result.loss_chart.parent)
    trained = [report for report in reports if report.phase == "training"]
    assert [point[:4] for point in history["points"][1:]] == [
        pytest.approx([report.done, report.loss, report.smoothed, report.learning_rate]) for report in trained
    ]
    assert history["points"][0][:2] == [0, None] and history["points"][0][4] is not None
    validated = {report.done: report.validation_loss for report in trained}
    assert {point[0]: point[4] for point in history["points"][1:]} == pytest.approx(validated, nan_ok=True)
    assert validated[1] is None and validated[2] is not None
    assert [(sample["step"], sample["image"]) for sample in history["samples"]] == [
        (2, "step-000002-00.png"),
        (2, "step-000002-01.png"),
        (4, "step-000004-00.png"),
        (4, "step-000004-01.png"),
        (None, "00.png"),
        (None, "01.png"),
    ]
    assert history["samples"][1]["prompt"] == "two"
    assert history["checkpoints"] == [2, 4] and history["finished"]
    assert history["report"] == json.loads((result.loss_chart.parent / "report.json").read_text())
    assert runs_of(result.loss_chart.parent.parent, result.loss_chart.parent.name) == [history["name"]]


def test_a_half_written_run_is_what_it_is_so_far(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(
        "step,loss,smoothed,learning_rate,validation_loss,images_per_second,memory\n1,0.5,0.5,1e-4,,2,9\n2,nan,0.5,1e-4,,2,9\n3,0.2"
    )
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/samples.csv").write_text("step,image,seed,prompt,clip_score\n2,gone.png,0,one,1")
    (tmp_path / "report.json").write_text("{")
    history = run_history(tmp_path)
    assert history["points"] == [[1, 0.5, 0.5, 1e-4, None], [2, None, 0.5, 1e-4, None]]
    assert (history["samples"], history["checkpoints"], history["report"]) == ([], [], None)
    assert not history["finished"] and runs_of(tmp_path / "none", "a") == []


def test_settings_without_effect_are_in_the_report_and_the_log(run: Train, caplog: pytest.LogCaptureFixture) -> None:
    note = "sample_every is 2, which has no effect while sample_prompts is empty"
    result = run(replace(SMALL, steps=2, sample_every=2))
    assert result.report.without_effect == [note] and note in caplog.text
    assert not (result.loss_chart.parent / "samples").exists()
    assert run(replace(SMALL, steps=2), where="b").report.without_effect is None
