"""What can go wrong while training, each injected: memory, numbers, files, two runs at a time."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdxl_lora_core.cache.folders import CacheFolders
from sdxl_lora_core.lora.files import read_lora, write_lora
from sdxl_lora_core.lora.modules import LoRAFile, LoRAModule
from sdxl_lora_core.sdxl.base import SDXLBase
from sdxl_lora_core.training.data.batches import Batch, PassOfUpdate
from sdxl_lora_core.training.loop import Diverged
from sdxl_lora_core.training.model.lora_linear import FusedLoRA
from sdxl_lora_core.training.model.trainable import TrainableSDXL
from sdxl_lora_core.training.optim.accumulation import Gradients
from sdxl_lora_core.training.run.loop_state import LoopState
from sdxl_lora_core.training.run.runs import RunFolders
from tests.micro.runs import (
    SMALL,
    Cancelled,
    Losses,
    Train,
    Trained,
    cancel_at,
    change_losses,
    load,
    lora_bytes,
    train_on,
)


def close_to(first: Path, second: Path) -> None:
    """As near as sums in another order: a relative 1e-3, or 1e-5 of values around 1e-2."""
    tensors = load_file(second)
    for name, tensor in load_file(first).items():
        torch.testing.assert_close(tensor, tensors[name], atol=1e-5, rtol=1e-3)


# Memory


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A device on which no more than `images` go through the UNet at once from `step` on; fewer with checkpointing."""

    def limit(images: int, step: int = 0, checkpointed: int | None = None) -> list[int]:
        passes = []

        def limited(losses: Losses, learner: TrainableSDXL, batch: Batch, now: int) -> torch.Tensor:
            count = len(batch.latents)
            allowed = images if checkpointed is None or not learner.unet.is_gradient_checkpointing else checkpointed
            if now >= step and count > allowed:
                raise torch.OutOfMemoryError("injected")
            passes.append(count)
            return losses(learner, batch)

        change_losses(monkeypatch, limited)
        return passes

    return limit


CONFIG = replace(SMALL, batch_size=3, steps=3, gradient_accumulation=2)


def test_out_of_memory_halves_the_pass_and_repeats_the_step(
    run: Train, trained: Trained, small_memory: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Three images, then two and one; buckets with fewer images stay as they are."""
    plain = trained(CONFIG)
    passes = small_memory(2, step=1)
    survived = run(CONFIG)
    assert max(passes) == 3 and max(passes[3:]) == 2 and caplog.text.count("images a pass, not 3") == 1
    assert survived.report.steps == 3
    close_to(survived.lora_path, plain.lora_path)


def test_memory_that_runs_out_within_a_backward_pass_leaves_no_part_of_a_gradient(
    run: Train, trained: Trained, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = trained(CONFIG)
    calls, backward = [0], FusedLoRA.backward

    def failing(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 40:
            raise torch.OutOfMemoryError("injected")
        return backward(*arguments)

    monkeypatch.setattr(FusedLoRA, "backward", staticmethod(failing))
    survived = run(CONFIG)
    assert "images a pass, not 3" in caplog.text
    tensors = load_file(plain.lora_path)
    for name, tensor in load_file(survived.lora_path).items():
        torch.testing.assert_close(tensor, tensors[name], rtol=1e-4, atol=1e-6)


def test_a_process_without_an_image_in_the_first_step_trains_in_fp16(run: Train, monkeypatch: Any) -> None:
    of_process = Gradients._passes

    def none_at_first(self: Gradients, step: int, state: LoopState) -> list[PassOfUpdate]:
        return of_process(self, step, state) if step else []

    monkeypatch.setattr(Gradients, "_passes", none_at_first)
    result = run(replace(SMALL, precision="fp16", steps=2))
    assert result.report.steps == 2 and not result.report.skipped_steps


def test_smaller_passes_stay_small_after_a_resume(run: Train, small_memory: Any) -> None:
    passes = small_memory(1, step=1)
    whole = run(CONFIG)
    with pytest.raises(Cancelled):
        run(CONFIG, where="b", on_step=cancel_at(2))
    passes.clear()
    assert lora_bytes(run(CONFIG, where="b")) == lora_bytes(whole)
    assert set(passes) == {1}


def test_out_of_memory_with_one_image_turns_checkpointing_on(
    run: Train, trained: Trained, small_memory: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plain = trained(CONFIG)
    small_memory(0, checkpointed=1)
    close_to(run(CONFIG).lora_path, plain.lora_path)
    assert "gradient checkpointing is on from here" in caplog.text


@pytest.mark.parametrize(
    ("checkpointing", "remedy"),
    [("off", "set gradient_checkpointing"), ("auto", "set offload_blocks to 1000, or lower the")],
)
def test_out_of_memory_for_good_says_what_to_change_and_keeps_what_was_trained(
    run: Train, small_memory: Any, tmp_path: Path, checkpointing: str, remedy: str
) -> None:
    small_memory(0, step=2)
    config = replace(SMALL, gradient_checkpointing=checkpointing)
    with pytest.raises(torch.OutOfMemoryError, match=f"at step 3 with a single image a pass: {remedy}.*rank.*injected"):
        run(config)
    assert (tmp_path / "a/runs/small/checkpoints/step-000002").exists()


def test_any_other_error_is_not_taken_for_a_lack_of_memory(run: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> torch.Tensor:
        raise RuntimeError("something else")

    change_losses(monkeypatch, failing)
    with pytest.raises(RuntimeError, match="something else"):
        run()


# Numbers


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the loss of some 0-based steps NaN."""

    def poison(steps: range) -> None:
        def poisoning(losses: Losses, learner: TrainableSDXL, batch: Batch, step: int) -> torch.Tensor:
            return losses(learner, batch) * (math.nan if step in steps else 1)

        change_losses(monkeypatch, poisoning)

    return poison


@pytest.mark.parametrize("checkpoint_every", [4, 1])
def test_five_bad_steps_in_a_row_end_the_run_at_the_last_good_state(
    run: Train, trained: Trained, poisoned: Any, tmp_path: Path, checkpoint_every: int
) -> None:
    good = load_file(trained(replace(SMALL, steps=3)).lora_path)
    poisoned(range(3, 99))
    config = replace(SMALL, steps=20, checkpoint_every=checkpoint_every)
    message = "not finite in 5 steps in a row, from step 4 on, and the LoRA of step-000003 is kept"
    for _ in range(2):  # the second try ends as the first one did
        with pytest.raises(Diverged, match=message):
            run(config, where="b")
    checkpoints = tmp_path / "b/runs/small/checkpoints"
    kept = load_file(checkpoints / "step-000003" / "adapter.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in good.items())
    assert not (tmp_path / "b/loras/small.safetensors").exists()


def test_four_bad_steps_in_a_row_do_not(run: Train, poisoned: Any) -> None:
    poisoned(range(1, 5))
    assert run(replace(SMALL, steps=6)).report.skipped_steps == [2, 3, 4, 5]


def test_a_loss_scale_that_is_still_falling_is_waited_for(
    run: Train, poisoned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda self: 2.0)
    poisoned(range(1, 8))
    assert len(run(replace(SMALL, steps=9)).report.skipped_steps) == 7


def test_weights_that_are_not_finite_are_never_saved(
    run: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original = torch.optim.AdamW.step

    def step(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        self.param_groups[0]["params"][0].data[0] = math.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises((Diverged, ValueError), match="NaN|finite"):
        run(replace(SMALL, checkpoint_every=1))
    assert "the LoRA has values that are not finite" in caplog.text
    assert not list(tmp_path.rglob("step-*")) and not list((tmp_path / "a/loras").iterdir())


def test_a_lora_too_large_for_fp16_is_not_written(tmp_path: Path) -> None:
    module = LoRAModule(down=torch.full((1, 4), 1e6), up=torch.ones(4, 1), alpha=1.0)
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = LoRAFile(unet={name: module}, metadata={})
    with pytest.raises(ValueError, match=r"a.safetensors is not written: .*lora_down.weight .*save in fp32 or bf16"):
        write_lora(tmp_path / "a.safetensors", lora, torch.float16)
    assert not list(tmp_path.iterdir())
    write_lora(tmp_path / "a.safetensors", lora, torch.float32)
    assert torch.equal(read_lora(tmp_path / "a.safetensors").unet[name].down, module.down)


# Files


def test_an_image_that_vanished_before_it_was_cached_is_named(
    tmp_path: Path, micro_base: SDXLBase, pictures: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(pictures, copy)
    dataset = load(copy)
    (copy / "1.png").unlink()
    folders = RunFolders(tmp_path / "l", tmp_path / "r", CacheFolders(tmp_path / "c"), lambda name: False)
    with pytest.raises(ValueError, match=r"1\.png no longer exists: load the dataset again"):
        train_on(micro_base, dataset, SMALL, folders=folders)


def test_images_that_change_or_vanish_while_training_change_nothing(
    run: Train, trained: Trained, tmp_path: Path, pictures: Path
) -> None:
    copy = tmp_path / pictures.name  # which the file names
    shutil.copytree(pictures, copy)

    def lose(report: Any) -> None:
        if report.phase == "training" and report.done == 1:
            (copy / "0.png").unlink()
            (copy / "1.png").write_bytes(b"another")

    assert lora_bytes(run(dataset=load(copy), on_step=lose)) == lora_bytes(trained())


def test_an_error_inside_a_step_loses_no_step_before_it(
    run: Train, trained: Trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = trained()

    def failing(losses: Losses, learner: TrainableSDXL, batch: Batch, step: int) -> torch.Tensor:
        if step == 2:
            raise FileNotFoundError("a cached file was deleted")
        return losses(learner, batch)

    with monkeypatch.context() as patch:
        change_losses(patch, failing)
        with pytest.raises(FileNotFoundError):
            run(where="b")
    assert (tmp_path / "b/runs/small/checkpoints/step-000002").exists()
    assert lora_bytes(run(where="b")) == lora_bytes(whole)


# Two at a time


HOLD = (
    "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); sys.stdin.read()"
)


@pytest.fixture
def other_process(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds the run `small`, as one that trains it does."""
    folder = tmp_path / "a/runs/small"
    folder.mkdir(parents=True)
    command = [sys.executable, "-c", HOLD, str(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()
        yield process


def test_a_run_that_another_process_trains_is_left_alone_until_that_process_dies(
    run: Train, other_process: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    assert run().lora_name == "small_00002.safetensors"
    assert [path.name for path in (tmp_path / "a/runs/small").iterdir()] == [".lock"]
    other_process.kill()
    other_process.wait()
    assert run(replace(SMALL, seed=1)).lora_name == "small.safetensors"
