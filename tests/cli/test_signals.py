"""Ctrl-C and SIGTERM on the command line."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdxl_lora_core.cli.main import main
from sdxl_lora_core.cli.signals import Interruption, Left
from sdxl_lora_core.training.loop import Loop
from tests.micro.runs import Train, change_losses

pytestmark = pytest.mark.skipif(os.name == "nt", reason="a Windows process cannot send itself these signals")


@pytest.fixture
def command(run: Train, tmp_path: Path) -> list[str]:
    """The command line that repeats a run of four steps; its output goes to `b`."""
    run()
    settings = str(tmp_path / "a/runs/small/run.yaml")
    home = str(tmp_path / "home")
    return ["train", settings, "--output", str(tmp_path / "b"), "--home", home, "--device", "cpu"]


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sends signals to this process in the update that follows some step."""

    def send(step: int, *numbers: int) -> None:
        original = Loop.update

        def update(self: Loop) -> None:
            if self.state.step == step:
                for number in numbers:
                    os.kill(os.getpid(), number)
            original(self)

        monkeypatch.setattr(Loop, "update", update)

    return send


def test_the_first_ctrl_c_finishes_now_and_keeps_the_lora(
    command: list[str], signal_at: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    signal_at(1, signal.SIGINT)
    main(command)
    captured = capsys.readouterr()
    assert "stopped on request after 2 of 4 steps" in captured.out
    assert "Finishing: the LoRA is saved after this step" in captured.err
    assert (tmp_path / "b/loras/small.safetensors").exists()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


@pytest.mark.parametrize(
    "numbers", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM,)], ids=["Ctrl-C twice", "SIGTERM"]
)
def test_leaving_writes_a_checkpoint_and_says_how_to_continue(
    command: list[str], signal_at: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], numbers: tuple[int, ...]
) -> None:
    signal_at(1, *numbers)
    with pytest.raises(SystemExit) as left:
        main(command)
    assert left.value.code == 128 + numbers[0]
    assert "stopped at a checkpoint before the end: the same command resumes it" in capsys.readouterr().err
    lora = tmp_path / "b/loras/small.safetensors"
    assert (tmp_path / "b/lora_runs/small/checkpoints/step-000002/state.json").exists() and not lora.exists()
    main(command)
    assert lora.read_bytes() == (tmp_path / "a/loras/small.safetensors").read_bytes()


def test_a_third_ctrl_c_does_not_wait() -> None:
    told: list[str] = []
    with Interruption(told.append) as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.should_stop()
        interruption.check()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Left):
            interruption.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert len(told) == 2


def test_a_run_that_diverges_ends_the_command_with_a_word(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    change_losses(monkeypatch, lambda losses, learner, batch, step: losses(learner, batch) * float("nan"))
    with pytest.raises(SystemExit, match="sdxl-lora: the loss was not finite"):
        main(command)
