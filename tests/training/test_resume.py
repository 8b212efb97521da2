"""A run that goes on: after a cancel, a stop, with more steps. The reference is always the run that never stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sdxl_lora_core.cache.folders import CacheFolders
from sdxl_lora_core.files import temporary_beside
from sdxl_lora_core.lora.files import read_lora
from sdxl_lora_core.sdxl.base import SDXLBase
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.data.batches import TrainingData
from sdxl_lora_core.training.job import TrainingJob
from sdxl_lora_core.training.monitor.progress import StepReport
from sdxl_lora_core.training.optim.lr_schedule import learning_rate
from sdxl_lora_core.training.run_length import batches_per_epoch, with_steps
from tests.micro.runs import CPU, SMALL, Cancelled, Train, Trained, cancel_at, load, lora_bytes

DROPOUT = {"dropout": 0.2, "caption_dropout": 0.3}


def folder_of(tmp_path: Path, where: str, name: str = "small") -> Path:
    return tmp_path / where / "runs" / name


def trained_steps(seen: list[StepReport]) -> list[int]:
    return [report.done for report in seen if report.phase == "training"]


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 9, "batch_size": 2, **DROPOUT},  # four batches an epoch, in three buckets: stops in the second epoch
        {"steps": 7, "batch_size": 1, "gradient_accumulation": 3, **DROPOUT},  # updates that reach over two epochs
        {"steps": 7, "lr_schedule": "cosine", "lr_warmup_steps": 3},
        {"steps": 7, "precision": "fp16"},  # with the state of the loss scaler
    ],
    ids=str,
)
def test_a_run_cancelled_three_times_ends_with_the_same_bytes(run: Train, change: dict[str, Any]) -> None:
    config = replace(SMALL, **change)
    whole = run(config)
    for step in (2, 3, 5):
        with pytest.raises(Cancelled):
            run(config, where="b", on_step=cancel_at(step))
    seen: list[StepReport] = []
    resumed = run(config, where="b", on_step=seen.append)
    assert trained_steps(seen) == list(range(6, config.steps + 1))
    assert lora_bytes(resumed) == lora_bytes(whole)
    assert replace(resumed.report, memory="") == replace(whole.report, memory="")  # how much of it was free


def test_run_yaml_counts_all_sessions(run: Train, trained: Trained, tmp_path: Path) -> None:
    def facts(folder: Path) -> dict[str, Any]:
        return yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))["run"]

    whole = facts(trained().loss_chart.parent)
    assert whole["resumed"] == 0 and whole["seconds"] > 0
    for step in (1, 3):
        with pytest.raises(Cancelled):
            run(where="b", on_step=cancel_at(step))
    checkpoint = folder_of(tmp_path, "b") / "checkpoints/step-000003/state.json"
    before = json.loads(checkpoint.read_text(encoding="utf-8"))["loop"]
    assert before["resumed"] == 1 and before["seconds"] > 0
    run(where="b")
    after = facts(folder_of(tmp_path, "b"))
    assert after["resumed"] == 2 and after["seconds"] > before["seconds"] - 0.1


def test_the_loss_scale_is_kept(run: Train, tmp_path: Path) -> None:
    config = replace(SMALL, precision="fp16", steps=2)
    run(config)
    state = json.loads((folder_of(tmp_path, "a") / "checkpoints/step-000002/state.json").read_text(encoding="utf-8"))
    assert state["scaler"]["_growth_tracker"] + len(state["loop"]["skipped"]) == 2


def test_every_checkpoint_is_a_lora(trained: Trained) -> None:
    result = trained(replace(SMALL, checkpoint_every=2))
    checkpoints = result.loss_chart.parent / "checkpoints"
    files = sorted(checkpoints.glob("step-*/adapter.safetensors"))
    assert [file.parent.name for file in files] == ["step-000002", "step-000004"]
    first, last = (read_lora(file) for file in files)
    assert first.unet.keys() == last.unet.keys() and not first.unknown
    assert not torch.equal(*(next(iter(lora.unet.values())).up for lora in (first, last)))
    final = load_file(result.lora_path)
    assert all(torch.equal(tensor, final[name]) for name, tensor in load_file(files[1]).items())
    assert first.metadata["ss_steps"] == "2" and first.metadata["ss_base_model_version"].startswith("sdxl_")


def test_a_checkpoint_whose_state_is_damaged_is_passed_over(
    run: Train, trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = trained()
    for step in (1, 2):
        with pytest.raises(Cancelled):
            run(where="b", on_step=cancel_at(step))
    state = folder_of(tmp_path, "b") / "checkpoints/step-000002/state.json"
    text = state.read_text(encoding="utf-8")
    state.write_text(text.replace('"step": 2', '"step": 3'), encoding="utf-8")
    assert lora_bytes(run(where="b")) == lora_bytes(whole)
    assert "step-000002 is skipped: state.json is damaged" in caplog.text


def test_a_checkpoint_of_another_version_is_neither_read_nor_lost(run: Train, tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        run(on_step=cancel_at(2))
    state = folder_of(tmp_path, "a") / "checkpoints/step-000002/state.json"
    state.write_text(json.dumps({**json.loads(state.read_text(encoding="utf-8")), "schema": 99}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"step-000002 in .* has schema 99 and this version reads \d+: finish the run"):
        run()
    assert state.exists()


def test_what_a_killed_process_left_is_swept(run: Train, tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        run(on_step=cancel_at(2))
    folder, loras = folder_of(tmp_path, "a"), tmp_path / "a" / "loras"
    uuid = "0123456789abcdef" * 2
    (folder / "checkpoints" / f".tmp-{uuid}").mkdir()
    left = [folder / f".report.json.{uuid}.tmp", temporary_beside(loras / "small.safetensors")]
    others = temporary_beside(loras / "other.safetensors")
    for file in (*left, others):
        file.write_text("cut off")
    run()
    assert not any(file.exists() for file in left) and others.exists()
    assert [path.name for path in (folder / "checkpoints").glob(".tmp*")] == []


def test_a_lock_that_a_dead_process_left_does_not_matter(run: Train, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a")
    folder.mkdir(parents=True)
    (folder / ".lock").write_text("4711")
    assert run().lora_name == "small.safetensors"


# More steps


@pytest.mark.parametrize("change", [{}, {"lr_warmup_steps": 2}, {"batch_size": 1, "gradient_accumulation": 3}], ids=str)
def test_more_steps_of_a_constant_rate_are_those_of_one_long_run(
    run: Train, trained: Trained, change: dict[str, Any]
) -> None:
    short, long = replace(SMALL, steps=3, **change), replace(SMALL, steps=6, **change)
    whole = trained(long)
    first = run(short)
    before = lora_bytes(first)
    seen: list[StepReport] = []
    more = run(long, on_step=seen.append)
    assert trained_steps(seen) == [4, 5, 6]
    assert more.lora_name == "small_00002.safetensors" and lora_bytes(first) == before
    assert same_tensors(more.lora_path, whole.lora_path)
    assert more.report.continued == "the first steps are those of small, as in one run of 6 steps"
    assert run(long).reused and run(short).reused


def same_tensors(first: Path, second: Path) -> bool:
    """Whole files differ in the name that stands in their metadata."""
    tensors, others = load_file(first), load_file(second)
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)


def test_more_steps_of_another_schedule_begin_it_anew_and_say_so(run: Train, tmp_path: Path) -> None:
    short = replace(SMALL, steps=4, lr_schedule="linear", lr_warmup_steps=2)
    run(short)
    long = replace(short, steps=8)
    more = run(long)
    assert "the schedule linear starts again, warm-up included" in more.report.continued
    state = json.loads(
        (folder_of(tmp_path, "a", "small_00002") / "checkpoints/step-000008/state.json").read_text(encoding="utf-8")
    )["loop"]
    assert state["learning_rates"] == pytest.approx([0.0005, 0.001, 0.001, 0.0005] * 2)
    with pytest.raises(Cancelled):
        run(replace(long, steps=10), on_step=cancel_at(9))
    assert run(replace(long, steps=10)).report.steps == 10


def test_more_steps_go_on_from_the_longest_of_several_and_survive_a_cancel(run: Train, trained: Trained) -> None:
    whole = trained(replace(SMALL, steps=8))
    for steps in (2, 5):
        run(replace(SMALL, steps=steps))
    with pytest.raises(Cancelled):
        run(replace(SMALL, steps=8), on_step=cancel_at(6))
    seen: list[StepReport] = []
    more = run(replace(SMALL, steps=8), on_step=seen.append)
    assert trained_steps(seen) == [7, 8]
    assert "those of small_00002," in more.report.continued
    assert same_tensors(more.lora_path, whole.lora_path)


def test_other_settings_or_a_longer_cosine_are_no_start(run: Train) -> None:
    run()
    assert run(replace(SMALL, steps=6, seed=1)).report.continued is None
    cosine = replace(SMALL, lr_schedule="cosine", steps=6)
    with pytest.raises(Cancelled):
        run(cosine, on_step=cancel_at(3))
    assert run(replace(cosine, steps=5)).report.continued is None


def test_another_way_to_choose_the_step_is_another_run(run: Train, pictures: Path) -> None:
    """Not the finished file again, and not a start that has none of what the choice needs."""
    dataset = load(pictures, validation_percent=20)
    best = replace(SMALL, validate_every=2, keep_best="validation_loss")
    run(dataset=dataset)
    chosen = run(best, dataset=dataset)
    assert not chosen.reused and chosen.report.continued is None
    assert run(replace(SMALL, validate_every=1), dataset=dataset).reused, "validation alone changes no file"
    whole = run(replace(best, steps=6, ema_decay=0.9), where="b", dataset=dataset)
    run(replace(best, ema_decay=0.9), where="c", dataset=dataset)
    more = run(replace(best, steps=6, ema_decay=0.9), where="c", dataset=dataset)
    assert more.report.continued is not None and same_tensors(more.lora_path, whole.lora_path)


@pytest.mark.parametrize("damage", ["truncated LoRA", "no LoRA", "no report", "broken report", "no chart"])
def test_results_that_are_gone_or_damaged_are_written_again_from_the_checkpoint(
    run: Train, tmp_path: Path, damage: str
) -> None:
    whole = run()
    before, folder = lora_bytes(whole), folder_of(tmp_path, "a")
    match damage:
        case "truncated LoRA":
            whole.lora_path.write_bytes(before[: len(before) // 2])
        case "no LoRA":
            whole.lora_path.unlink()
        case "no report":
            (folder / "report.json").unlink()
        case "broken report":
            (folder / "report.json").write_text("{", encoding="utf-8")
        case _:
            (folder / "loss.png").unlink()
    seen: list[StepReport] = []
    again = run(on_step=seen.append)
    assert trained_steps(seen) == [] and not again.reused
    assert lora_bytes(again) == before and again.lora_path == whole.lora_path
    assert (folder / "report.json").exists() and again.loss_chart.exists()
    assert run().reused


def test_another_format_trains_nothing_again(run: Train) -> None:
    run()
    seen: list[StepReport] = []
    half = run(replace(SMALL, save_dtype="fp16"), on_step=seen.append)
    assert trained_steps(seen) == [] and half.lora_name == "small_00002.safetensors"
    assert torch.float16 in {tensor.dtype for tensor in load_file(half.lora_path).values()}


def test_the_rest_of_a_schedule_counts_from_its_new_start() -> None:
    config = TrainConfig(steps=30, learning_rate=1.0, lr_warmup_steps=15, lr_schedule="linear")
    assert [learning_rate(config, step, 20) for step in (20, 28, 29)] == pytest.approx([1 / 9, 1.0, 1.0])
    assert learning_rate(config, 14) == 1.0
    assert learning_rate(replace(config, lr_warmup_steps=0), 25, 20) == pytest.approx(0.5)


# Stop and keep


def stop_at(step: int) -> dict[str, Any]:
    seen: list[StepReport] = []
    return {"on_step": seen.append, "should_stop": lambda: trained_steps(seen)[-1:] == [step]}


def test_a_stopped_run_is_kept_and_goes_on_with_another_number_of_steps(run: Train, trained: Trained) -> None:
    stopped = run(**stop_at(2))
    assert stopped.report.steps == 2 and stopped.report.stopped.startswith("stopped on request after 2 of 4")
    half = lora_bytes(stopped)
    again = run(on_step=lambda report: pytest.fail("trained again"))
    assert again.reused and lora_bytes(again) == half
    seen: list[StepReport] = []
    longer = replace(SMALL, steps=5)
    rest = run(longer, on_step=seen.append)
    assert trained_steps(seen) == [3, 4, 5] and rest.report.stopped is None
    assert rest.lora_name == "small_00002.safetensors" and lora_bytes(stopped) == half
    assert same_tensors(rest.lora_path, trained(longer).lora_path)


def test_a_stopped_run_is_kept_by_asking_for_the_steps_it_had(run: Train) -> None:
    stopped = run(**stop_at(2))
    kept = run(replace(SMALL, steps=2), on_step=lambda report: None)
    assert kept.report.steps == 2 and same_tensors(kept.lora_path, stopped.lora_path)
    assert kept.report.continued is not None


def test_a_stop_after_the_last_step_is_none(run: Train) -> None:
    assert run(**stop_at(4)).report.stopped is None
    assert run().reused


# Epochs


@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 1), (1, 2), (2, 3)])
def test_epochs_take_the_place_of_steps(
    run: Train, micro_base: SDXLBase, pictures: Path, cache: Path, tmp_path: Path, batch_size: int, accumulation: int
) -> None:
    dataset = load(pictures)
    config = replace(SMALL, epochs=2, batch_size=batch_size, gradient_accumulation=accumulation, lr_schedule="linear")
    job = TrainingJob(micro_base, dataset, config)
    data = TrainingData(job, CacheFolders(cache), CPU)
    counts = dict.fromkeys(range(len(dataset.entries)), 0)
    result = run(config)
    passes = [batch for step in range(result.report.steps) for batch in data.micro_batches(step)]
    for index in [index for batch in passes[: 2 * batches_per_epoch(job)] for index in batch]:
        counts[index] += 1
    assert set(counts.values()) == {2}
    assert len(passes) - 2 * batches_per_epoch(job) < accumulation
    assert result.report.epochs >= 2
    document = yaml.safe_load((folder_of(tmp_path, "a") / "run.yaml").read_text(encoding="utf-8"))
    assert document["train"]["steps"] == result.report.steps and document["run"]["epochs"] == result.report.epochs
    same = run(replace(config, epochs=0, steps=result.report.steps), where="b")
    assert lora_bytes(same) == lora_bytes(result), "the schedule falls over the steps that the epochs take"


def test_repeats_lengthen_an_epoch(micro_base: SDXLBase, pictures: Path) -> None:
    config = replace(SMALL, batch_size=1)
    once, thrice = (TrainingJob(micro_base, load(pictures, repeats=repeats), config) for repeats in (1, 3))
    assert batches_per_epoch(thrice) == 3 * batches_per_epoch(once) == 15


def test_a_warm_up_longer_than_the_epochs_is_shortened(
    micro_base: SDXLBase, pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A preset brings one along, whoever chose the epochs."""
    settings = replace(SMALL, epochs=3, lr_warmup_steps=50)
    config = with_steps(TrainingJob(micro_base, load(pictures), settings)).config
    assert (config.steps, config.lr_warmup_steps) == (12, 1)
    assert "lr_warmup_steps is 50 and the epochs are 12 steps: warming up over 1" in caplog.text
