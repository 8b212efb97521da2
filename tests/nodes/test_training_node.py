"""What the training node shows while it trains, and what it hands to the engine to look with."""

from __future__ import annotations

import contextlib
import itertools
import json
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tests.nodes.fake_comfyui import fake_modules
from tools.run_workflow import ROOT, load_pack

PACK = load_pack()
Progress = PACK.nodes.host.progress.Progress
StepReport = import_module(f"{PACK.__name__}.sdxl_lora_core.training.monitor.progress").StepReport


class Shown:
    """Stands in for ComfyUI while a node runs: the bar with its picture, and the messages to the pages."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, node_id: str | None = "12:7") -> None:
        self.bars: list[tuple[int, int, Any]] = []
        self.messages: list[dict[str, Any]] = []
        bar = SimpleNamespace(update_absolute=lambda done, total, picture: self.bars.append((done, total, picture)))
        queued = (0, "a-prompt", {}, {"extra_pnginfo": {"workflow": {"id": "a-workflow"}}})
        server = SimpleNamespace(
            send_sync=lambda event, status: self.messages.append({"event": event, **status}),
            prompt_queue=SimpleNamespace(get_current_queue=lambda: ([queued], [])),
        )
        management = SimpleNamespace(
            throw_exception_if_processing_interrupted=self.check, InterruptProcessingException=Cancelled
        )
        context = SimpleNamespace(prompt_id="a-prompt", node_id=node_id) if node_id else None
        modules = {
            "folder_paths": SimpleNamespace(),
            "comfy.utils": SimpleNamespace(ProgressBar=lambda total: bar),
            "comfy.model_management": management,
            "comfy_execution.utils": SimpleNamespace(get_executing_context=lambda: context),
            "server": SimpleNamespace(PromptServer=SimpleNamespace(instance=server)),
        }
        fake_modules(monkeypatch, modules)
        self.cancelled = False

    def check(self) -> None:
        if self.cancelled:
            raise Cancelled

    @property
    def lines(self) -> list[tuple[str, int, int, str]]:
        return [(told["phase"], told["done"], told["total"], told["detail"]) for told in self.messages]


class Cancelled(BaseException):
    """ComfyUI's InterruptProcessingException."""


@pytest.fixture
def every_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PACK.nodes.host.status, "SECONDS", 0)


def step(done: int, loss: float, **more: Any) -> StepReport:
    return StepReport("training", done, 5, loss, loss, 1e-4, 2.0, 10**9, 60.0, **more)


@pytest.mark.usefixtures("every_message")
def test_the_bar_and_the_messages_to_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown(monkeypatch)
    with Progress() as progress:
        progress.on_run("cat")
        progress.on_step(step(1, 0.5))
        progress.on_step(step(2, 0.25, validation_loss=0.125))
    assert [bar[:2] for bar in shown.bars] == [(1, 5), (2, 5)]
    first, second, last = shown.messages
    told = {name: first[name] for name in ("event", "workflow", "prompt", "node", "state", "run", "phase", "done")}
    assert told == {
        "event": "sdxl_lora.status",
        "workflow": "a-workflow",
        "prompt": "a-prompt",
        "node": "12:7",
        "state": "running",
        "run": "cat",
        "phase": "training",
        "done": 1,
    }
    assert (first["points"], second["points"]) == ([(1, 0.5, 0.5, 1e-4, None)], [(2, 0.25, 0.25, 1e-4, 0.125)])
    assert second["numbers"]["images_per_second"] == 2.0 and second["numbers"]["memory"] == 10**9
    assert second["detail"] == "loss 0.2500, lr 1.00e-04, 2.00 images/s, 1.0 GB, 1:00 left"
    assert (last["state"], last["points"]) == ("done", [])
    assert json.loads(json.dumps(PACK.nodes.host.status.board.all()))[-1]["state"] == "done"


def test_messages_are_at_most_four_a_second_and_lose_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown(monkeypatch)
    clock = itertools.count()
    monkeypatch.setattr(PACK.nodes.host.status, "time", SimpleNamespace(monotonic=lambda: 100 + next(clock) / 40))
    with Progress() as progress:
        for done in range(1, 401):
            progress.on_step(step(done, 0.5))
    assert len(shown.messages) <= 4 * 10 + 3
    assert [point[0] for told in shown.messages for point in told["points"]] == list(range(1, 401))


def test_a_note_is_shown_while_the_node_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown(monkeypatch)
    with Progress() as progress:
        progress.note("set it to 128")
        progress(1, 5, "generating")
    assert [told["message"] for told in shown.messages] == ["set it to 128", ""]


@pytest.mark.parametrize(("error", "state"), [(Cancelled(), "cancelled"), (ValueError("a\nreason"), "failed")])
def test_what_ends_the_work_is_told(monkeypatch: pytest.MonkeyPatch, error: BaseException, state: str) -> None:
    shown = Shown(monkeypatch)
    with pytest.raises(type(error)), Progress() as progress:
        progress(1, 5, "generating")
        raise error
    assert (shown.messages[-1]["state"], shown.messages[-1]["done"]) == (state, 1)
    assert shown.messages[-1]["message"] == " ".join(str(error).split())


def test_a_cancel_is_raised_by_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown(monkeypatch)
    with pytest.raises(Cancelled), Progress() as progress:
        progress(1, 5, "generating")
        shown.cancelled = True
        progress(2, 5, "generating")
    assert shown.messages[-1]["state"] == "cancelled"


@pytest.mark.usefixtures("every_message")
def test_the_terminal_counts_on_after_another_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown(monkeypatch)
    with Progress() as progress:
        progress(40, 100, "training")
        progress(1, 25, "validating")
        progress(41, 100, "training")
        assert progress._terminal.format_dict["initial"] == 41, "the speed would be that of 41 steps at once"
    assert shown.lines[1] == ("validating", 1, 25, "")


def test_nobody_is_told_where_no_node_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown(monkeypatch, node_id=None)
    with Progress() as progress:
        progress(1, 5, "training", "loss 0.1")
    assert len(shown.bars) == 1 and shown.messages == []


def test_the_clip_model_is_found_by_its_name_and_the_second_dataset_travels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pictures: Path
) -> None:
    dataset = PACK.sdxl_lora_core.dataset
    trained, held_out = (
        dataset.caption_dataset.load_caption_dataset(folder, dataset.config.DatasetConfig(resolution=64))
        for folder in (ROOT / "assets/sample-dataset", pictures)
    )
    monkeypatch.setenv("SDXL_LORA_HOME", str(tmp_path))
    taken: dict[str, Any] = {}

    def train(job: Any, context: Any) -> Any:
        taken.update(config=job.config, validation=job.dataset.validation)
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module(f"{PACK.__name__}.sdxl_lora_core.training.train"), "train", train)
    node: Any = PACK.NODE_CLASS_MAPPINGS["TrainSDXLLoRA"]()
    (options,) = PACK.NODE_CLASS_MAPPINGS["WatchOptions"]().collect(clip_model="tiny-clip (bundled)")
    with contextlib.suppress(KeyboardInterrupt):
        node.train(tiny_base(), trained, options=options, validation=held_out, sample_prompts="one")
    assert taken["config"].clip_model == str(ROOT / "assets/tiny-clip")
    assert taken["validation"] == held_out.entries and len(held_out.entries) == 5


def tiny_base() -> Any:
    return import_module(f"{PACK.__name__}.sdxl_lora_core.sdxl.base").open_base(ROOT / "assets/tiny-sdxl")


def test_the_node_says_where_the_lora_is_and_what_was_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SDXL_LORA_HOME", str(tmp_path))
    chart = tmp_path / "loss.png"
    Image.new("RGB", (8, 8)).save(chart)
    facts = {"lora": "a", "base": "b", "images": 3, "steps": 20, "epochs": 2.0, "loss": 0.12345, "modules": 1}
    more = {"adapter": "lora", "rank": 4, "trigger_words": ["ohwx"], "memory": "", "skipped_steps": []}
    report = import_module(f"{PACK.__name__}.sdxl_lora_core.training.report").RunReport(
        **facts, **more, skipped_files=["x.psd: cannot be read"]
    )
    result = SimpleNamespace(
        loss_chart=chart,
        image_chart=None,
        samples=[],
        report=report,
        lora_name="a",
        lora_path=tmp_path / "a.safetensors",
        state_dict={},
    )
    monkeypatch.setattr(
        import_module(f"{PACK.__name__}.sdxl_lora_core.training.train"), "train", lambda job, context: result
    )
    node: Any = PACK.NODE_CLASS_MAPPINGS["TrainSDXLLoRA"]()
    dataset: Any = SimpleNamespace(entries=[SimpleNamespace(resolution=128), SimpleNamespace(resolution=1024)])
    shown = node.train(tiny_base(), dataset, preset="style", steps=20, lr_cycles=2)
    assert "1024 takes long and will not look right. Set resolution of Load Caption Dataset to 128." in caplog.text
    told = [
        f"Saved as {tmp_path / 'a.safetensors'}: 20 steps on 3 images, loss 0.1235.",
        "trigger words: ohwx",
        "left out: x.psd: cannot be read",
    ]
    notes = shown["ui"]["text"][0].splitlines()[3:]
    assert shown["ui"]["text"][0].splitlines()[:3] == told
    assert notes[0].startswith("preset style: lr_warmup_steps 50 is left out, because ")
    assert notes[-1] == "lr_cycles is 2, which has no effect while lr_schedule is 'cosine'"
    assert shown["result"][5] == shown["ui"]["sdxl_lora_report"][0] == report.to_json()
