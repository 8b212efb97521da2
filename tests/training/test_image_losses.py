"""The loss of each training image: which caption may be wrong; and LoRAs of earlier steps."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from sdxl_lora_core.lora.files import read_lora
from sdxl_lora_core.sdxl.base import SDXLBase
from sdxl_lora_core.training.data.batches import IMAGE_TIMESTEPS
from sdxl_lora_core.training.image_report import captions_to_check, rated_images
from sdxl_lora_core.training.outputs import RunOutputs
from sdxl_lora_core.training.run.loop_state import ImageLosses
from tests.micro.runs import SMALL, Cancelled, Train, Trained, cancel_at, data_of, load, lora_bytes, trainable

MEASURED = replace(SMALL, image_losses="on")


def run_folder(home: Path) -> Path:
    return home / "a/runs/small"


def state_of(home: Path) -> dict[str, Any]:
    newest = sorted((run_folder(home) / "checkpoints").glob("step-*"))[-1]
    return json.loads((newest / "state.json").read_text())["loop"]


def test_each_image_is_measured_at_fixed_timesteps_with_and_without_its_caption(
    run: Train, pictures: Path, micro_base: SDXLBase, tmp_path: Path
) -> None:
    run(MEASURED)
    losses = state_of(tmp_path)["image_losses"]
    data = data_of(micro_base, load(pictures), tmp_path / "cache", image_losses="on")
    model = trainable(micro_base, SMALL).eval()
    for with_captions, name in ((True, "captioned"), (False, "uncaptioned")):
        batches = list(data.image_batches(with_captions))
        assert [int(batch.timesteps) for batch in batches] == list(IMAGE_TIMESTEPS) * len(data.captions)
        assert {batch.captions[0] == "" for batch in batches} == {not with_captions}
        with torch.no_grad():
            errors = torch.stack([model.squared_errors(batch)[0] for batch in batches]).double()
        assert losses[name] == pytest.approx(errors.reshape(-1, 3).mean(1).tolist(), rel=1e-6)


def test_the_losses_do_not_change_the_run_and_are_exact_under_resume(
    run: Train, trained: Trained, tmp_path: Path
) -> None:
    whole = trained(MEASURED)
    assert lora_bytes(whole) == lora_bytes(trained(replace(SMALL, image_losses="off")))
    with pytest.raises(Cancelled):
        run(replace(MEASURED, checkpoint_every=1), on_step=cancel_at(2))
    resumed = run(replace(MEASURED, checkpoint_every=1))
    assert lora_bytes(resumed) == lora_bytes(whole)
    assert whole.image_chart and resumed.image_chart
    tables = [result.image_chart.with_suffix(".csv").read_text() for result in (whole, resumed) if result.image_chart]
    assert tables[0] == tables[1]
    rows = list(csv.DictReader(tables[0].splitlines()))
    assert len(rows) > 1 and all(float(row["loss_after_training"]) > 0 for row in rows)
    assert [float(row["ratio"]) for row in rows] == sorted((float(row["ratio"]) for row in rows), reverse=True)
    for row in rows:
        assert float(row["ratio"]) == pytest.approx(float(row["loss"]) / float(row["loss_without_caption"]), rel=1e-4)
    assert Image.open(whole.image_chart).size[0] == 960


@pytest.mark.parametrize(
    ("config", "measured"),
    [
        (replace(SMALL, image_losses="off"), False),
        (SMALL, False),  # auto: 4 steps of 2 images
        (replace(SMALL, steps=1000), True),
        (replace(SMALL, steps=2, gradient_accumulation=1000), True),
        (MEASURED, True),
    ],
)
def test_auto_measures_if_it_takes_less_than_a_tenth_of_the_training(
    micro_base: SDXLBase, pictures: Path, tmp_path: Path, config: Any, measured: bool
) -> None:
    chosen = {name: getattr(config, name) for name in ("image_losses", "steps", "gradient_accumulation")}
    data = data_of(micro_base, load(pictures), tmp_path, **chosen)
    assert data.measures_images == measured
    assert ("" in data.prompt_files) == measured


def entries(count: int) -> list[Any]:
    return [SimpleNamespace(image=Path(f"{number}.png"), caption=f"caption {number}") for number in range(count)]


def test_an_image_far_above_the_others_is_an_outlier() -> None:
    ratios = [0.8, 0.7, 0.75, 1.1, 0.72, 0.78, 0.77]
    losses = ImageLosses([2 * ratio for ratio in ratios], [2.0] * 7, [0.5] * 7)
    rated = rated_images(entries(7), losses)
    assert [image.name for image in rated][:2] == ["3.png", "0.png"]
    assert [image.outlier for image in rated] == [True] + [False] * 6
    assert rated[0].ratio == pytest.approx(1.1) and rated[0].trained == 0.5
    (line,) = captions_to_check(rated)
    assert line == "3.png: its caption may be wrong (1.10 of the loss without a caption, others 0.77): caption 3"
    same = rated_images(entries(3), ImageLosses([1.0] * 3, [1.0] * 3))
    assert captions_to_check(same) == [] and same[0].trained is None


def test_at_most_three_captions_are_listed() -> None:
    losses = ImageLosses([0.5 + 0.001 * i for i in range(20)] + [2.0] * 5, [1.0] * 25)
    rated = rated_images(entries(25), losses)
    assert sum(image.outlier for image in rated) == 5 and len(captions_to_check(rated)) == 3


# LoRAs of earlier steps


def step_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*"))


def test_loras_of_earlier_steps_are_those_of_a_run_of_that_length(run: Train, trained: Trained) -> None:
    result = run(replace(SMALL, steps=5, save_every=2))
    folder = result.lora_path.with_suffix("")
    assert step_files(folder) == ["step-000002.safetensors", "step-000004.safetensors"]
    kept, whole = read_lora(folder / "step-000004.safetensors"), read_lora(trained(SMALL).lora_path)
    assert kept.unet.keys() == whole.unet.keys()
    for name, module in kept.unet.items():
        for ours, theirs in zip(module.factors.values(), whole.unet[name].factors.values(), strict=True):
            assert torch.equal(ours, theirs)
    assert kept.metadata["ss_steps"] == "4" and kept.metadata["ss_output_name"] == "small"


def test_a_resumed_run_keeps_the_same_loras(run: Train) -> None:
    config = replace(SMALL, steps=5, save_every=2, checkpoint_every=1)
    whole = run(config, where="a")
    with pytest.raises(Cancelled):
        run(config, where="b", on_step=cancel_at(3))
    resumed = run(config, where="b")
    contents = [
        [(path.name, path.read_bytes()) for path in sorted(result.lora_path.with_suffix("").iterdir())]
        for result in (whole, resumed)
    ]
    assert len(contents[0]) == 2 and contents[0] == contents[1]


def test_a_folder_of_that_name_is_not_written_to(run: Train, tmp_path: Path) -> None:
    mine = tmp_path / "a/loras/small/step-000002.safetensors"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"of somebody else")
    result = run(replace(SMALL, save_every=2))
    assert result.lora_path.name == "small_00002.safetensors" and mine.read_bytes() == b"of somebody else"
    assert step_files(result.lora_path.with_suffix("")) == ["step-000002.safetensors"]


def test_a_full_disk_costs_the_lora_of_that_step_only(
    run: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunOutputs, "write_step", full)
    result = run(replace(SMALL, save_every=2))
    assert result.lora_path.exists() and "the LoRA of step 2 is not kept" in caplog.text
