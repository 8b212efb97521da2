"""Training on the stand-in accelerator: equal to the CPU's, nothing left on the device, one wait a step.

Collected by name only, in a process with `-p tests.standin.plugin`: see test_standin.py.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdxl_lora_core.dataset.caption_dataset import CaptionDataset, load_caption_dataset
from sdxl_lora_core.dataset.config import DatasetConfig
from sdxl_lora_core.runtime import device
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.loop import Loop
from sdxl_lora_core.training.monitor.progress import StepReport
from sdxl_lora_core.training.monitor.sample_images import SampleRenderer
from sdxl_lora_core.training.train import TrainResult
from tests.micro.runs import SMALL, Cancelled, Train, cancel_at, change_losses, load, parameters_alive
from tests.standin.accelerator import ACCEL, NAME

DEVICE = torch.device(NAME, 0)
EXACT = replace(SMALL, precision="fp32")  # auto would be bf16 on the device
ADAPTERS = ("lora", "dora", "loha", "lokr")


def both(run: Train, config: TrainConfig, **more: Any) -> tuple[TrainResult, TrainResult]:
    """The same run on the CPU and on the device, where it leaves nothing."""
    on_cpu = run(config, where="cpu", **more)
    return on_cpu, on_device(run, config, **more)


def on_device(run: Train, config: TrainConfig, **more: Any) -> TrainResult:
    alive, allocated = parameters_alive(), ACCEL.allocated
    result = run(config, where="device", device=DEVICE, **more)
    assert not parameters_alive() - alive
    assert ACCEL.allocated == allocated
    return result


def require_equal(one: TrainResult, other: TrainResult, tolerance: float = 0) -> None:
    first, second = load_file(one.lora_path), load_file(other.lora_path)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=tolerance, msg=name)
    assert one.report.loss == pytest.approx(other.report.loss, abs=tolerance)
    for image, drawn in zip(one.samples, other.samples, strict=True):
        assert np.array_equal(image, drawn)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_run_is_the_cpus(run: Train, adapter: Any, precision: Any) -> None:
    require_equal(*both(run, replace(SMALL, adapter=adapter, precision=precision)))


def test_a_run_with_stored_weights_is_the_cpus(run: Train) -> None:
    """The weights are quantised and moved after the adapter was added, and again for each sample."""
    config = replace(EXACT, base_weights="int8", offload_blocks=3, sample_prompts=("a red circle",), sample_every=2)
    require_equal(*both(run, replace(config, sample_steps=2)))


@pytest.mark.usefixtures("real_plan")
@pytest.mark.parametrize(
    "adapter", [pytest.param(kind, marks=() if kind in ("lora", "loha") else pytest.mark.accept) for kind in ADAPTERS]
)
def test_the_memory_plan_keeps_nothing(run: Train, adapter: Any, tmp_path: Path) -> None:
    on_device(run, replace(SMALL, adapter=adapter, steps=1), cache=tmp_path / "cache")  # a new one, so that it measures


def test_a_run_that_is_resumed_is_the_one_that_was_not(run: Train) -> None:
    """Nor does it keep the checkpoint's file open."""
    config = replace(SMALL, steps=6, ema_decay=0.9, dropout=0.2)
    whole = run(config, where="whole", device=DEVICE)
    allocated = ACCEL.allocated
    for step in (2, 4):
        with pytest.raises(Cancelled):
            run(config, device=DEVICE, on_step=cancel_at(step))
        assert ACCEL.allocated == allocated

    def on_step(report: StepReport) -> None:
        if os.path.exists("/proc/self/maps"):
            assert "state.safetensors" not in Path("/proc/self/maps").read_text()

    require_equal(whole, run(config, device=DEVICE, on_step=on_step))


@pytest.mark.parametrize("count", [20, pytest.param(100, marks=pytest.mark.accept)])
def test_a_step_waits_for_the_device_once_and_a_checkpoint_hardly_more(
    run: Train, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """The one wait is for the loss of the step before; there is none in the step itself."""
    within: list[int] = []
    update = Loop.update

    def noting(self: Loop) -> None:
        before = ACCEL.waits.total()
        update(self)
        within.append(ACCEL.waits.total() - before)

    seen: list[int] = []

    def on_step(report: StepReport) -> None:
        if report.phase == "training":
            seen.append(ACCEL.waits.total())

    monkeypatch.setattr(Loop, "update", noting)
    config = replace(SMALL, steps=count, checkpoint_every=count - 2, snr_gamma=5.0, precision="bf16", ema_decay=0.9)
    run(config, device=DEVICE, on_step=on_step)
    assert within == [0] * count
    assert len(seen) == count
    steps = [after - before for before, after in zip(seen, seen[1:], strict=False)]
    assert steps[:-4] == [1] * (count - 5)
    assert sum(steps[-4:]) <= 4 + 5  # weights, average, moments, adapter, and whether it is finite: one transfer each


@pytest.mark.parametrize(("optimizer", "own"), [("came", 0), ("schedule_free", 0)])
def test_an_optimizer_that_cannot_skip_on_the_device_waits_once_before_its_update(
    run: Train, optimizer: Any, own: int
) -> None:
    seen: list[int] = []

    def on_step(report: StepReport) -> None:
        if report.phase == "training":
            seen.append(ACCEL.waits.total())

    pytest.importorskip("pytorch_optimizer")
    result = run(replace(SMALL, steps=6, optimizer=optimizer, precision="bf16"), device=DEVICE, on_step=on_step)
    steps = [after - before for before, after in zip(seen, seen[1:], strict=False)]
    assert steps[:4] == [1 + own] * 4 and "waits for the loss" in result.report.memory


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "came"])
def test_an_update_that_is_not_finite_changes_nothing_and_is_reported(
    run: Train, optimizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken_at_the_second(losses: Any, model: Any, batch: Any, step: int) -> torch.Tensor:
        return losses(model, batch) * (float("nan") if step == 1 else 1.0)

    pytest.importorskip("pytorch_optimizer")
    change_losses(monkeypatch, broken_at_the_second)
    config = replace(EXACT, steps=4, optimizer=optimizer, ema_decay=0.5)
    on_cpu, on_device = both(run, config)
    require_equal(on_cpu, on_device)
    assert on_device.report.skipped_steps == [2]


def test_the_device_is_free_while_samples_are_drawn(run: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    allocated: list[int] = []
    of_step = SampleRenderer.of_step

    def noting(self: SampleRenderer, *args: Any) -> Any:
        allocated.append(ACCEL.allocated)
        return of_step(self, *args)

    monkeypatch.setattr(SampleRenderer, "of_step", noting)
    config = replace(EXACT, sample_prompts=("a red circle",), sample_every=2, sample_steps=2, ema_decay=0.9)
    before = ACCEL.allocated
    require_equal(*both(run, config))
    schedule = 2 * 1000 * 4  # bytes of the noise schedule and the weights of its timesteps
    assert allocated == [before, before, before + schedule, before + schedule]


def test_where_memory_runs_out_the_passes_are_halved(
    run: Train, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(EXACT, batch_size=4, steps=2, blocks="")
    monkeypatch.setattr(device, "free_memory", lambda where: 1e12)  # another program takes memory after the plan
    whole = run(config, where="whole", device=DEVICE)
    peak = ACCEL.peak - ACCEL.allocated
    with ACCEL.limited(int(0.7 * peak)):
        smaller = on_device(run, config)
    assert "from here 2 images a pass, not 4" in caplog.text
    require_equal(whole, smaller, tolerance=1e-5)


# Everything else that a run can do, in `make accept`


OPTIONS: dict[str, dict[str, Any]] = {
    "text encoders": {"text_encoder_learning_rate": 1e-3, "text_encoder_2_learning_rate": 1e-3},
    "one text encoder": {"text_encoder_2_learning_rate": 1e-3, "adapter": "dora"},
    "text encoders alone": {
        "blocks": "",
        "train_unet": False,
        "learning_rate": 1e-4,
        "text_encoder_learning_rate": 1e-3,
    },
    "new tokens": {"new_tokens": "picture", "vectors_per_token": 2},
    "masks": {"masked_loss": True},
    "ema": {"ema_decay": 0.9},
    "huber": {"loss": "huber"},
    "smooth_l1": {"loss": "smooth_l1"},
    "min-snr": {"snr_gamma": 5.0},
    "debiased": {"debiased": True},
    "noise offset": {"noise_offset": 0.1},
    "multi-resolution noise": {"multires_noise_iterations": 2},
    "input perturbation": {"input_perturbation": 0.1},
    "logit-normal timesteps": {"timestep_sampling": "logit_normal"},
    "v-prediction with zero SNR": {"prediction": "v_prediction", "zero_terminal_snr": "on"},
    "selective checkpointing": {"gradient_checkpointing": "selective"},
    "checkpointing": {"gradient_checkpointing": "on"},
    "dropout": {"dropout": 0.2},
    "rank and module dropout": {"adapter": "lokr", "rank_dropout": 0.2, "module_dropout": 0.2},
    "rslora": {"use_rslora": True},
    "gaussian": {"init": "gaussian"},
    "pissa": {"init": "pissa"},
    "ranks and rates by block": {"block_ranks": "mid_block=4", "block_learning_rates": "mid_block=0.5"},
    "lora+": {"lora_plus_ratio": 4.0},
    "convolutions": {"target_modules": "all-linear+conv", "blocks": "down_blocks.1,mid_block"},
    "accumulation": {"gradient_accumulation": 2},
    "one image a pass": {"images_per_pass": 1},
    "deterministic": {"deterministic": True},
    "validation and the best": {"validate_every": 2, "keep_best": "validation_loss"},
    "early stopping": {"validate_every": 1, "early_stopping": 1, "steps": 8},
    "class images": {"class_prompt": "a picture", "class_images": 2, "prior_weight": 0.5},
    "samples": {"sample_prompts": ("a red circle",), "sample_every": 2, "sample_steps": 2},
    **{name: {"optimizer": name} for name in ("adamw_fused", "adafactor", "lion", "came", "schedule_free")},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
}


@pytest.fixture
def masked(pictures: Path, tmp_path: Path) -> CaptionDataset:
    folder = tmp_path / "masked"
    folder.mkdir()
    for file in pictures.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for image in sorted(pictures.glob("*.png")):
        mask = Image.new("L", Image.open(image).size, 0)
        mask.paste(255, (0, 0, 32, 32))
        mask.save(folder / f"{image.stem}-masklabel.png")
    return load_caption_dataset(folder, DatasetConfig(resolution=64))


@pytest.mark.accept
def test_a_run_with_regularisation_images_is_the_cpus(run: Train, pictures: Path, tmp_path: Path) -> None:
    config = DatasetConfig(resolution=64, is_regularisation=True)
    dataset = load_caption_dataset(pictures, config, another_picture(tmp_path / "mine"))
    require_equal(*both(run, replace(EXACT, prior_weight=0.5), dataset=dataset), tolerance=1e-6)


def another_picture(folder: Path) -> CaptionDataset:
    """One that is not trained on."""
    folder.mkdir()
    Image.new("RGB", (64, 64), (1, 2, 3)).save(folder / "other.png")
    (folder / "other.txt").write_text("another picture")
    return load(folder)


@pytest.mark.accept
@pytest.mark.parametrize("option", OPTIONS)
def test_a_run_with_an_option_is_the_cpus(run: Train, option: str, masked: CaptionDataset, tmp_path: Path) -> None:
    settings = OPTIONS[option]
    more: dict[str, Any] = {"dataset": masked} if "masked_loss" in settings else {}
    if "validate_every" in settings:
        more["validation"] = another_picture(tmp_path / "validation")
    require_equal(*both(run, replace(EXACT, **settings), **more), tolerance=1e-6)
