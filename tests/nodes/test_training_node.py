"""What the training node shows while it trains, and what it hands to the engine to look with."""

from __future__ import annotations

import contextlib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.nodes.fake_comfyui import fake_modules
from tools.run_workflow import ROOT, load_pack

PACK = load_pack()
Progress = PACK.nodes.host.progress.Progress


class Shown:
    """Stands in for what ComfyUI's page is sent: the bar with its picture, the text beside it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, node_id: str | None = "7") -> None:
        self.bars: list[tuple[int, int, Any]] = []
        self.texts: list[tuple[str, str]] = []
        bar = SimpleNamespace(update_absolute=lambda done, total, picture: self.bars.append((done, total, picture)))
        server = SimpleNamespace(send_progress_text=lambda text, node: self.texts.append((text, node)))
        modules = {
            "folder_paths": SimpleNamespace(),
            "comfy.utils": SimpleNamespace(ProgressBar=lambda total: bar),
            "comfy.model_management": SimpleNamespace(throw_exception_if_processing_interrupted=lambda: None),
            "comfy_execution.utils": SimpleNamespace(
                get_executing_context=lambda: SimpleNamespace(node_id=node_id) if node_id else None
            ),
            "server": SimpleNamespace(PromptServer=SimpleNamespace(instance=server)),
        }
        fake_modules(monkeypatch, modules)


def test_the_bar_the_numbers_and_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown(monkeypatch)
    pixels = np.zeros((4, 8, 3), np.uint8)
    with Progress() as progress:
        progress(1, 5, "training", "loss 0.1")
        progress(2, 5, "training", "loss 0.2, lr 1e-4", pixels)
    assert [bar[:2] for bar in shown.bars] == [(1, 5), (2, 5)]
    kind, picture, side = shown.bars[1][2]
    assert (kind, picture.size, side, shown.bars[0][2]) == ("JPEG", (8, 4), 512, None)
    assert shown.texts == [("training: 1 of 5\nloss 0.1", "7"), ("training: 2 of 5\nloss 0.2\nlr 1e-4", "7")]


def test_the_terminal_counts_on_after_another_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown(monkeypatch)
    with Progress() as progress:
        progress(40, 100, "training")
        progress(1, 25, "validating")
        progress(41, 100, "training")
        assert progress._terminal.format_dict["initial"] == 41, "the speed would be that of 41 steps at once"
    assert shown.texts[1] == ("validating: 1 of 25", "7")


def test_no_text_where_no_node_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown(monkeypatch, node_id=None)
    with Progress() as progress:
        progress(1, 5, "training", "loss 0.1")
    assert len(shown.bars) == 1 and shown.texts == []


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
        node.train(None, trained, options=options, validation=held_out, sample_prompts="one")
    assert taken["config"].clip_model == str(ROOT / "assets/tiny-clip")
    assert taken["validation"] == held_out.entries and len(held_out.entries) == 5


def test_the_node_shows_what_a_preset_leaves_out_above_the_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SDXL_LORA_HOME", str(tmp_path))
    chart = tmp_path / "loss.png"
    Image.new("RGB", (8, 8)).save(chart)
    result = SimpleNamespace(
        loss_chart=chart, samples=[], report=SimpleNamespace(to_json=lambda: "{}"), lora_name="a", state_dict={}
    )
    monkeypatch.setattr(
        import_module(f"{PACK.__name__}.sdxl_lora_core.training.train"), "train", lambda job, context: result
    )
    node: Any = PACK.NODE_CLASS_MAPPINGS["TrainSDXLLoRA"]()
    shown = node.train(None, None, preset="style", steps=20)["ui"]["text"][0]
    assert shown.startswith("preset style: lr_warmup_steps 50 is left out, because ") and shown.endswith("\n{}")
    assert node.train(None, None, preset="style")["ui"]["text"][0] == "{}"
