"""The whole job on a random micro SDXL: exactness, resume, cancel, and that each setting takes effect."""

from __future__ import annotations

import csv
import errno
import json
import math
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from sdxl_lora_core.cache.folders import CacheFolders
from sdxl_lora_core.cli.main import main
from sdxl_lora_core.dataset.caption_dataset import load_caption_dataset
from sdxl_lora_core.dataset.config import DatasetConfig
from sdxl_lora_core.hashed_random import generator
from sdxl_lora_core.lora.files import read_lora
from sdxl_lora_core.sdxl import loading
from sdxl_lora_core.sdxl.base import SDXLBase, load_part, open_base
from sdxl_lora_core.training import loop, outputs
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.data.batches import Batch, PassOfUpdate, TrainingData
from sdxl_lora_core.training.data.latent_cache import make_sample
from sdxl_lora_core.training.job import TrainingJob
from sdxl_lora_core.training.loop import Loop
from sdxl_lora_core.training.model.trainable import TrainableSDXL
from sdxl_lora_core.training.monitor.progress import StepReport
from sdxl_lora_core.training.optim.lr_schedule import lr_factor
from sdxl_lora_core.training.run import checkpoints
from sdxl_lora_core.training.run.runs import RunFolders
from tests.micro.runs import (
    CPU,
    SMALL,
    WHOLE,
    Cancelled,
    Losses,
    Train,
    Trained,
    cancel_at,
    change_losses,
    data_of,
    load,
    lora_bytes,
    train_on,
)


def test_the_same_settings_give_the_same_bytes_and_leave_the_random_state(run: Train, trained: Trained) -> None:
    first = trained(WHOLE)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert lora_bytes(run(WHOLE)) == lora_bytes(first)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("real_charts")
def test_a_run_leaves_what_the_design_says(run: Train) -> None:
    result = run(WHOLE)
    folder = result.lora_path.parents[1] / "runs" / "small"
    settings = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
    assert settings["train"]["rank"] == 2 and settings["run"]["fingerprint"]
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert all(math.isfinite(float(row["loss"])) for row in rows)
    assert Image.open(result.loss_chart).size == (960, 540)
    assert result.report.steps == 4 and result.report.skipped_steps == []
    with safe_open(result.lora_path, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"].startswith("sdxl_")
    assert str(folder.parent) not in json.dumps(metadata)


def test_the_base_is_untouched_and_the_lora_is_not_zero(trained: Trained, micro_base: SDXLBase) -> None:
    before = open_base(micro_base.path).fingerprint
    ups = [tensor for name, tensor in load_file(trained().lora_path).items() if name.endswith("lora_up.weight")]
    assert ups and all(tensor.abs().max() > 0 for tensor in ups)
    assert open_base(micro_base.path).fingerprint == before == micro_base.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 2e-3},
        {"rank": 4},
        {"alpha": 8.0},
        {"batch_size": 1},
        {"seed": 1},
        {"steps": 3},
        {"gradient_accumulation": 2},
        {"lr_schedule": "linear"},
        {"lr_schedule": "cosine"},
        {"lr_warmup_steps": 2},
        {"target_modules": "attention+ff"},
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear+conv"},
        {"dropout": 0.5},
        {"caption_dropout": 0.9},
        {"precision": "bf16"},
        {"adam_beta1": 0.5},
        {"adam_beta2": 0.9},
        {"weight_decay": 1.0},
        {"max_grad_norm": 1e-4},
        {"save_dtype": "fp16"},
        {"save_format": "peft"},
    ],
    ids=str,
)
def test_each_setting_changes_the_file(run: Train, trained: Trained, change: dict[str, Any]) -> None:
    changed = run(replace(SMALL, **change))
    assert not same_tensors(load_file(trained().lora_path), load_file(changed.lora_path))


def same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


@pytest.mark.parametrize(
    "change", [{"repeats": 3}, {"flip": True}, {"trigger_word": "zxq"}, {"resolution": 80}], ids=str
)
def test_each_dataset_setting_changes_the_file(
    run: Train, trained: Trained, pictures: Path, change: dict[str, Any]
) -> None:
    changed = load_caption_dataset(pictures, DatasetConfig(**{"resolution": 64, **change}))
    assert not same_tensors(load_file(trained().lora_path), load_file(run(dataset=changed).lora_path))


def test_gradient_checkpointing_is_used_and_changes_nothing(
    run: Train, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load_file(trained().lora_path)
    used: list[bool] = []
    original = loop.Loop.update

    def spy(self: Loop) -> None:
        used.append(self.model.unet.is_gradient_checkpointing)
        original(self)

    monkeypatch.setattr(loop.Loop, "update", spy)
    checkpointed = load_file(run(replace(SMALL, gradient_checkpointing="on")).lora_path)
    assert all(used) and len(used) == SMALL.steps
    for name, tensor in plain.items():
        torch.testing.assert_close(checkpointed[name], tensor, atol=1e-6, rtol=1e-5)


def test_accumulation_equals_one_large_batch(run: Train, pictures: Path, tmp_path: Path) -> None:
    """Three square pictures: one batch of three, or three of one in one epoch, with the same noise."""
    square = tmp_path / "square"
    square.mkdir()
    for number in range(3):
        shutil.copy(pictures / "0.png", square / f"{number}.png")
        (square / f"{number}.txt").write_text("one and the same")
    dataset = load(square)
    large = run(replace(SMALL, batch_size=3, steps=2), dataset=dataset)
    parts = run(replace(SMALL, batch_size=1, gradient_accumulation=3, steps=2), where="b", dataset=dataset)
    found = load_file(parts.lora_path)
    for name, tensor in load_file(large.lora_path).items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-3)


def test_a_cancelled_run_continues_to_the_same_bytes(run: Train) -> None:
    config = replace(WHOLE, steps=5, dropout=0.2, caption_dropout=0.3, gradient_accumulation=2, lr_schedule="cosine")
    whole = run(config)
    for step in (2, 3):
        with pytest.raises(Cancelled):
            run(config, where="b", on_step=cancel_at(step))
    seen: list[int] = []
    resumed = run(config, where="b", on_step=lambda r: seen.append(r.done) if r.phase == "training" else None)
    assert seen == [4, 5]
    assert lora_bytes(resumed) == lora_bytes(whole)


def test_a_damaged_checkpoint_is_passed_over(
    run: Train, trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        with pytest.raises(Cancelled):
            run(on_step=cancel_at(step))
    folder = tmp_path / "a" / "runs" / "small" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000001", "step-000002"]
    target = folder / "step-000002" / "state.safetensors"
    damaged = bytearray(target.read_bytes())
    damaged[-1] ^= 1
    target.write_bytes(damaged)
    assert lora_bytes(run()) == lora_bytes(trained())
    assert "step-000002 is skipped: state.safetensors is damaged" in caplog.text


def test_two_checkpoints_are_kept(run: Train) -> None:
    result = run(replace(SMALL, checkpoint_every=1))
    folder = result.lora_path.parents[1] / "runs" / "small" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000003", "step-000004"]


def test_stop_keeps_what_is_trained(run: Train) -> None:
    steps: list[int] = []
    result = run(on_step=lambda report: steps.append(report.done), should_stop=lambda: steps[-1:] == [2])
    assert result.report.steps == 2 and "stopped on request after 2 of 4" in result.report.stopped
    assert result.lora_path.exists()


def test_a_finished_run_is_reused_and_another_gets_its_own_name(run: Train) -> None:
    first = run()
    again = run(on_step=lambda report: pytest.fail("trained again"))
    assert again.reused and again.lora_path == first.lora_path
    other = run(replace(SMALL, seed=9))
    assert other.lora_name == "small_00002.safetensors"
    assert "small was taken" in other.report.note
    assert lora_bytes(first) != lora_bytes(other)
    longer = run(replace(SMALL, steps=5))
    assert longer.lora_name == "small_00003.safetensors"


def test_deterministic_steps_and_nothing_else_are_deterministic(run: Train) -> None:
    enabled = torch.are_deterministic_algorithms_enabled

    def modes(config: TrainConfig, where: str) -> set[bool]:
        seen: set[bool] = set()
        run(config, where=where, on_step=lambda report: seen.add(enabled()) if report.phase == "training" else None)
        return seen

    assert modes(replace(SMALL, deterministic=True), "a") == {True} and not enabled()
    assert modes(SMALL, "b") == {False}


def test_a_start_that_failed_leaves_its_name_free(run: Train) -> None:
    with pytest.raises(ValueError, match="no image of .* has a mask"):
        run(replace(SMALL, masked_loss=True))
    assert run().lora_name == "small.safetensors"


def test_folders_of_unequal_repeats_are_told_apart(run: Train, pictures: Path, tmp_path: Path) -> None:
    for name, numbers in (("3_cat", (0, 1, 2)), ("10_dog", (3,))):
        (tmp_path / "many" / name).mkdir(parents=True)
        for number in numbers:
            for suffix in ("png", "txt"):
                shutil.copy(pictures / f"{number}.{suffix}", tmp_path / "many" / name)
    metadata = read_lora(run(replace(SMALL, steps=1), dataset=load(tmp_path / "many")).lora_path).metadata
    assert metadata["ss_num_train_images"] == "19"
    assert json.loads(metadata["ss_dataset_dirs"]) == {
        "3_cat": {"n_repeats": 3, "img_count": 3},
        "10_dog": {"n_repeats": 10, "img_count": 1},
    }
    assert json.loads(metadata["ss_tag_frequency"])["10_dog"] == {"picture number 3": 1}


def test_a_name_taken_in_another_folder_is_not_used(
    tmp_path: Path, micro_base: SDXLBase, pictures: Path, cache: Path
) -> None:
    folders = RunFolders(
        tmp_path / "loras", tmp_path / "runs", CacheFolders(cache), lambda name: name == "small.safetensors"
    )
    result = train_on(micro_base, load(pictures), SMALL, folders=folders)
    assert result.lora_name == "small_00002.safetensors"


def test_a_loss_that_is_not_finite_is_not_learned_from(run: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(losses: Losses, learner: TrainableSDXL, batch: Batch, step: int) -> torch.Tensor:
        return losses(learner, batch) * (math.nan if step == 1 else 1)

    change_losses(monkeypatch, poisoned)
    result = run()
    assert result.report.skipped_steps == [2]
    assert all(tensor.isfinite().all() for tensor in load_file(result.lora_path).values())


def test_a_run_that_never_had_a_finite_loss_saves_nothing(
    run: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    change_losses(monkeypatch, lambda losses, learner, batch, step: losses(learner, batch) * math.nan)
    with pytest.raises(RuntimeError, match="not finite in any of 4 steps.*precision bf16 or fp32"):
        run()
    assert not list((tmp_path / "a" / "loras").iterdir())


def test_out_of_memory_turns_on_checkpointing_and_repeats_the_step(
    run: Train, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load_file(trained().lora_path)
    failures = iter([True])

    def failing(losses: Losses, learner: TrainableSDXL, batch: Batch, step: int) -> torch.Tensor:
        if next(failures, False):
            raise torch.OutOfMemoryError("injected")
        return losses(learner, batch)

    change_losses(monkeypatch, failing)
    survived = load_file(run().lora_path)
    for name, tensor in plain.items():
        torch.testing.assert_close(survived[name], tensor, atol=1e-6, rtol=1e-5)


@contextmanager
def no_file_over(size: int) -> Iterator[None]:
    """The library's own error for a disk that takes no more, not one that a test made up."""
    resource = pytest.importorskip("resource", reason="needs a limit on file sizes, which Windows has not")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_costs_the_checkpoint_not_the_run(
    run: Train, trained: Trained, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = trained()
    original = checkpoints.save_tensors

    def full(path: Path, tensors: Any) -> None:
        if path.parent.name.startswith(".tmp") and not failed:
            failed.append(True)
            with no_file_over(1000):
                original(path, tensors)
        original(path, tensors)

    failed: list[bool] = []
    monkeypatch.setattr(checkpoints, "save_tensors", full)
    result = run(replace(SMALL, checkpoint_every=3))
    assert "no checkpoint at step 3" in caplog.text
    assert lora_bytes(result) == lora_bytes(whole)


def test_a_disk_that_is_full_at_the_end_says_so_and_the_run_continues_later(
    run: Train, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained()
    original = outputs.write_lora

    def full(path: Path, *rest: Any) -> None:
        if path.parent.name == "loras":
            raise OSError(errno.ENOSPC, f"could not write {path.name}: No space left on device")
        original(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "write_lora", full)
        with pytest.raises(OSError, match="No space left"):
            run()
    steps: list[StepReport] = []
    resumed = run(on_step=steps.append)
    assert [report for report in steps if report.phase == "training"] == []
    assert lora_bytes(resumed) == lora_bytes(whole)


def test_a_disk_without_room_for_checkpoints_is_found_before_the_first_step(
    run: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    steps: list[StepReport] = []
    with pytest.raises(OSError, match="MB are free: free some space or lower the rank"):
        run(on_step=steps.append)
    assert not [report for report in steps if report.phase == "training"]


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_the_room_asked_for_is_what_checkpoints_take(
    init: Any, run: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[int] = []

    def require_space(folder: Path, size: int, copies: int) -> None:
        asked.append(copies * size)

    monkeypatch.setattr(loop, "require_space", require_space)
    run(replace(SMALL, init=init, steps=1))
    (checkpoint,) = (tmp_path / "a/runs/small/checkpoints").iterdir()
    files = [load_file(file) for file in checkpoint.glob("*.safetensors")]
    assert asked == [pytest.approx(sum(tensor.nbytes for file in files for tensor in file.values()), rel=0.02)]


def test_an_output_folder_that_cannot_be_written_is_found_before_anything_is_loaded(
    run: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "loras").write_text("a file where the folder should be")
    monkeypatch.setattr(loading, "from_folder", lambda *_: pytest.fail("loaded a model"))
    with pytest.raises(OSError, match="cannot write to .*training has not started"):
        run()


def test_validation_is_reported_and_does_not_move_the_training(run: Train, trained: Trained, pictures: Path) -> None:
    dataset = load(pictures, validation_percent=20)
    result = trained(validation_percent=20)
    trained_only = replace(dataset, validation=())
    assert lora_bytes(result) == lora_bytes(run(where="b", dataset=trained_only))
    assert result.report.validation_loss != result.report.validation_loss_before
    other_seed = run(replace(SMALL, seed=5, steps=1), where="c", dataset=dataset)
    assert other_seed.report.validation_loss_before == result.report.validation_loss_before


def test_text_encoders_and_vae_are_gone_before_the_unet_comes(
    run: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, micro_base: SDXLBase, pictures: Path
) -> None:
    original, alive = loading.from_folder, {}

    def from_folder(folder: Path, part: Any, dtype: torch.dtype) -> Any:
        if part == "unet":
            assert {name for name, reference in alive.items() if reference() is not None} == set()
        module = original(folder, part, dtype)
        alive[part] = weakref.ref(module)
        return module

    monkeypatch.setattr(loading, "from_folder", from_folder)
    folders = RunFolders(tmp_path / "l", tmp_path / "r", CacheFolders(tmp_path / "fresh cache"), lambda name: False)
    train_on(micro_base, load(pictures), SMALL, folders=folders)
    assert set(alive) == {"text_encoder", "text_encoder_2", "vae", "unet"}


def test_a_second_run_encodes_nothing_again(run: Train, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    trained()
    original = loading.from_folder

    def from_folder(folder: Path, part: Any, dtype: torch.dtype) -> Any:
        assert part == "unet"
        return original(folder, part, dtype)

    monkeypatch.setattr(loading, "from_folder", from_folder)
    assert run(replace(SMALL, seed=3)).report.steps == 4


def test_a_damaged_cache_file_is_made_again(
    trained: Trained, tmp_path: Path, micro_base: SDXLBase, pictures: Path
) -> None:
    first, own = trained(), tmp_path / "own cache"
    data_of(micro_base, load(pictures), own)
    for file in own.glob("*/v1/*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:-4])
    folders = RunFolders(tmp_path / "l", tmp_path / "r", CacheFolders(own), lambda name: False)
    assert lora_bytes(train_on(micro_base, load(pictures), SMALL, folders=folders)) == lora_bytes(first)


def test_an_image_that_changed_after_loading_is_named(tmp_path: Path, micro_base: SDXLBase, pictures: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(pictures, copy)
    dataset = load(copy)
    Image.new("RGB", (64, 64), "green").save(copy / "1.png")
    folders = RunFolders(tmp_path / "l", tmp_path / "r", CacheFolders(tmp_path / "c"), lambda name: False)
    with pytest.raises(ValueError, match=r"1\.png changed after the dataset was loaded"):
        train_on(micro_base, dataset, SMALL, folders=folders)


def test_samples_are_drawn_with_the_lora_and_cached(run: Train, trained: Trained) -> None:
    config = replace(SMALL, sample_prompts=("one", "two"), sample_steps=2)
    result = run(config)
    files = sorted((result.lora_path.parents[1] / "runs" / "small" / "samples").iterdir())
    assert [file.name for file in files] == ["00.png", "01.png"]
    assert [sample.shape for sample in result.samples] == [(64, 64, 3)] * 2
    assert lora_bytes(result) == lora_bytes(trained())


def test_v_prediction_trains_towards_v(run: Train, trained: Trained, micro_base: SDXLBase) -> None:
    v_base = replace(micro_base, prediction_type="v_prediction", fingerprint="v")
    assert not same_tensors(load_file(trained().lora_path), load_file(run(base=v_base).lora_path))


def test_learning_rate_schedules_match_their_closed_forms() -> None:
    config = TrainConfig(steps=110, lr_warmup_steps=10)
    assert [lr_factor(config, step) for step in (0, 4, 9, 10, 109)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    linear, cosine = replace(config, lr_schedule="linear"), replace(config, lr_schedule="cosine")
    assert lr_factor(linear, 60) == pytest.approx(0.5)
    assert lr_factor(linear, 109) == pytest.approx(0.01)
    assert lr_factor(cosine, 35) == pytest.approx(0.5 + math.sqrt(0.5) / 2)


def test_random_numbers_depend_on_seed_step_and_position_only() -> None:
    draws = [torch.randn(3, generator=generator(*place)) for place in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))]
    assert len({tuple(draw.tolist()) for draw in draws}) == 4
    assert torch.equal(torch.randn(3, generator=generator(0, 0, 0)), draws[0])


def test_every_image_is_seen_once_an_epoch_in_its_own_bucket(micro_base: SDXLBase, pictures: Path, cache: Path) -> None:
    data = TrainingData(TrainingJob(micro_base, load(pictures), SMALL), CacheFolders(cache), CPU)
    data.cache(lambda *_: None)
    seen: list[int] = []
    step = 0
    while len(seen) < 5:
        (indices,) = data.micro_batches(step)
        assert len({data.job.entries[index].bucket for index in indices}) == 1
        batch = data.batch(PassOfUpdate(step, tuple(indices)))
        width, height = data.job.entries[indices[0]].bucket
        assert batch.latents.shape == (len(indices), 4, height // 8, width // 8)
        assert batch.time_ids[0, 4:].tolist() == [height, width]
        seen += indices
        step += 1
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_a_fresh_sample_is_drawn_from_the_posterior_each_step(
    micro_base: SDXLBase, pictures: Path, cache: Path
) -> None:
    data = TrainingData(TrainingJob(micro_base, load(pictures), SMALL), CacheFolders(cache), CPU)
    data.cache(lambda *_: None)
    first, second = (data.batch(PassOfUpdate(step, (0,))) for step in (0, 1))
    mean, std = data.variants[0][0].posterior()
    assert not torch.equal(first.latents, second.latents)
    assert ((first.latents[0] - mean).abs() <= 6 * std).all()


def test_the_cached_posterior_is_the_vaes_own(micro_base: SDXLBase, pictures: Path, cache: Path) -> None:
    data = TrainingData(TrainingJob(micro_base, load(pictures), SMALL), CacheFolders(cache), CPU)
    data.cache(lambda *_: None)
    vae = load_part(micro_base, "vae", torch.float32)
    pixels = torch.tensor(np.asarray(Image.open(pictures / "0.png")), dtype=torch.float32)
    pixels = pixels.permute(2, 0, 1)[None].contiguous() / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    mean, std = data.variants[0][0].posterior()
    scale = vae.config.scaling_factor
    torch.testing.assert_close(mean, posterior.mean[0] * scale)
    torch.testing.assert_close(std, posterior.std[0] * scale)


def test_a_mirrored_crop_has_mirrored_coordinates(micro_base: SDXLBase, tmp_path: Path, cache: Path) -> None:
    Image.new("RGB", (101, 64)).save(tmp_path / "wide.png")
    (tmp_path / "wide.txt").write_text("wide")
    (entry,) = load(tmp_path, flip=True).entries
    plain, mirrored = (make_sample(micro_base, entry, entry.center, flip, cache) for flip in (False, True))
    crop = plain.crop
    assert plain.time_ids().tolist() == [64, 101, crop.top, crop.left, crop.bucket_h, crop.bucket_w]
    assert mirrored.time_ids()[3] == crop.resized_w - crop.bucket_w - crop.left


def test_run_yaml_repeats_the_run_from_the_command_line(
    trained: Trained, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = trained()
    settings = result.loss_chart.with_name("run.yaml")
    main(
        [
            "train",
            str(settings),
            "--output",
            str(tmp_path / "again"),
            "--home",
            str(cache),
            "--device",
            "cpu",
        ]
    )
    repeated = tmp_path / "again" / "loras" / "small.safetensors"
    assert same_tensors(load_file(repeated), load_file(result.lora_path))
    assert repeated.read_bytes() == lora_bytes(result)
    assert str(repeated) in capsys.readouterr().out


def test_a_wrong_run_yaml_is_refused_before_anything_is_opened(trained: Trained, tmp_path: Path) -> None:
    settings = tmp_path / "run.yaml"
    written = trained().loss_chart.with_name("run.yaml").read_text(encoding="utf-8")
    settings.write_text(written.replace("rank: 2", "rnak: 2"), encoding="utf-8")
    with pytest.raises(SystemExit, match="run.yaml line \\d+: train: unknown setting rnak"):
        main(["train", str(settings), "--output", str(tmp_path)])


def test_inspect_says_what_a_path_is(
    trained: Trained, micro_sdxl: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = trained().lora_path
    capsys.readouterr()
    for path, words in [(micro_sdxl, "SDXL, diffusers folder"), (lora, "rank 2"), (pictures, "5 images")]:
        main(["inspect", str(path)])
        assert words in capsys.readouterr().out
    with pytest.raises(SystemExit, match="does not exist"):
        main(["inspect", "nowhere"])


def test_a_finished_run_of_an_earlier_version_is_found_and_an_unfinished_one_is_not_continued(
    run: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    identity = tmp_path / "a/runs/small/identity"
    now = TrainingJob.fingerprint.func
    monkeypatch.setattr(TrainingJob, "fingerprint", property(lambda job: job.earlier_fingerprints[-1]))
    earlier = run(SMALL)
    monkeypatch.setattr(TrainingJob, "fingerprint", property(now))
    before = identity.read_text()
    found = run(SMALL)
    assert found.reused and found.lora_path == earlier.lora_path and identity.read_text() == before
    (tmp_path / "a/runs/small/finished").unlink()
    new = run(SMALL)
    assert not new.reused and new.lora_path != earlier.lora_path
