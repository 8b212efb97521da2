"""A style LoRA with validation, samples and early stopping: cancelled once, continued, and trained again in one go."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

STEPS, EVERY, PATIENCE = 80, 5, 4
SETTINGS = {
    "LoadCaptionDataset": {"resolution": 64, "validation_percent": 10},
    "WatchOptions": {
        "validate_every": EVERY,
        "early_stopping": PATIENCE,
        "sample_every": 2 * EVERY,
        "sample_steps": 4,
        "checkpoint_every": STEPS,
    },
    # So high a rate that the validation loss rises soon.
    "TrainSDXLLoRA": {"lora_name": "watched", "steps": STEPS, "learning_rate": 0.01, "rank": 16, "batch_size": 1},
    "SDXLGenerateCached": {"steps": 2, "count": 1, "width": 64, "height": 64},
}
CHART_COLORS = {"smoothed loss": "#1f4e8c", "validation": "#b3261e", "samples": "#2e7d32", "checkpoints": "#6a4c93"}


class Story:
    """The shipped workflow with quick settings, and what its run leaves in a server's output folder."""

    def __init__(self, server: Any, workflow: dict[str, Any]) -> None:
        self.server, self.workflow = server, workflow
        self.run = server.base / "output/lora_runs/watched"
        self.lora = server.base / "output/loras/watched.safetensors"

    def cancelled(self) -> int:
        """Runs until some validations are past, cancels, and returns the step of the checkpoint."""
        seen = len(self.server.text())
        prompt = self.server.queue(self.workflow)
        self.server.wait(lambda: max(self.steps_shown(seen), default=0) > EVERY, 120)
        self.server.post("/interrupt", {})
        messages = self.server.finished(prompt)["status"]["messages"]
        assert messages[-1][0] == "execution_interrupted", "it was over before it could be cancelled"
        (checkpoint,) = (self.run / "checkpoints").iterdir()
        return int(checkpoint.name.removeprefix("step-"))

    def forgotten(self, other: dict[str, Any]) -> None:
        """Removes run and LoRA; after another prompt ComfyUI has dropped this one's outputs, too."""
        self.server.run(other)
        shutil.rmtree(self.run)
        self.lora.unlink()

    def steps_shown(self, seen: int) -> list[int]:
        shown = re.findall(rf"training: .*?\| (\d+)/{STEPS}", self.server.text()[seen:])
        return [int(step) for step in shown if step != "0"]

    def metrics(self) -> list[dict[str, str]]:
        return list(csv.DictReader((self.run / "metrics.csv").read_text(encoding="utf-8").splitlines()))

    def results(self) -> dict[str, bytes]:
        """What has to be the same however often the run was cut off."""
        pictures = {path.name: path.read_bytes() for path in (self.run / "samples").glob("*.png")}
        measured = [[row[name] for name in ("step", "loss", "validation_loss")] for row in self.metrics()]
        return {**pictures, "lora": self.lora.read_bytes(), "metrics": json.dumps(measured).encode()}


@pytest.fixture
def story(server: Any, shipped: dict[str, Any], shrink: Callable[..., Any]) -> Story:
    return Story(server, shrink(shipped["train_and_watch"], **SETTINGS))


def test_a_watched_training_is_cancelled_goes_on_and_stops_early(
    story: Story, shipped: dict[str, Any], shrink: Callable[..., Any]
) -> None:
    step = story.cancelled()
    before = story.metrics()
    written = int(before[-1]["step"])  # one less where the validation of the last step was what was cancelled
    assert step - 1 <= written <= step and step > EVERY and not story.lora.exists()

    seen = len(story.server.text())
    outputs = story.server.run(story.workflow)
    rows = story.metrics()
    assert f"training resumes at step {step}\n" in story.server.text()[seen:]
    assert min(story.steps_shown(seen)) >= step, "training began anew"
    assert rows[: len(before)] == before, "steps were done again: their speeds are not those of the first time"
    check_report(json.loads(outputs["4"]["sdxl_lora_report"][0]), rows)
    check_chart(story.run / "loss.png")
    check_samples(story.run / "samples", last=int(rows[-1]["step"]))
    assert len(outputs["4"]["images"]) == 3, "the chart and the finished LoRA's two samples"
    assert "trained on tiny-sdxl for" in outputs["5"]["text"][0]
    assert len(outputs["6"]["images"]) == 4 and outputs["7"]["images"] and outputs["8"]["images"]

    results = story.results()
    story.forgotten(shrink(shipped["score_images"]))
    story.server.run(story.workflow)
    in_one_go = story.results()
    assert results.keys() == in_one_go.keys()
    assert [name for name in results if results[name] != in_one_go[name]] == []


def check_report(report: dict[str, Any], rows: list[dict[str, str]]) -> None:
    """That it says what metrics.csv shows: when the validation loss was lowest, and how long the run went on."""
    validated = {int(row["step"]): float(row["validation_loss"]) for row in rows if row["validation_loss"]}
    assert report["validation_loss_before"] == validated.pop(0)
    best = min(validated, key=lambda step: validated[step])
    last = int(rows[-1]["step"])
    assert last == best + PATIENCE * EVERY < STEPS, "the validation loss did not end the run"
    assert report["steps"] == last and report["validation_loss"] == validated[best] < validated[last]
    assert report["early_stopping"].startswith(f"stopped early after {last} of {STEPS} steps: {PATIENCE} validations")
    assert report["kept"] == f"the file has the adapter of step {best}, the best by validation_loss"
    assert len(report["clip_scores"]) == 2 and report["images"] < 24


def check_chart(path: Path) -> None:
    drawn = {f"#{r:02x}{g:02x}{b:02x}" for r, g, b in np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)}
    assert [name for name, color in CHART_COLORS.items() if color not in drawn] == []


def check_samples(folder: Path, last: int) -> None:
    due = [f"step-{step:06d}-{number:02d}.png" for step in range(2 * EVERY, last + 1, 2 * EVERY) for number in (0, 1)]
    pictures = {path.name: np.asarray(Image.open(path)) for path in folder.glob("*.png")}
    assert sorted(pictures) == sorted([*due, "00.png", "01.png"])
    assert all(pixels.std() > 10 for pixels in pictures.values()), "a sample is blank"
    assert len({pixels.tobytes() for pixels in pictures.values()}) == len(pictures), "samples repeat over the steps"
    scored = list(csv.DictReader((folder / "samples.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["image"] for row in scored] == due
    assert len({float(row["clip_score"]) for row in scored}) > 1, "no picture is scored by what it shows"
