"""Caption Images: captions of a model, of another node, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_lora_core.captioning import hub
from tests.micro.captioners import write_blip, write_onnx_tagger, write_pictures
from tools.run_workflow import load_pack, run

PACK = load_pack()
NODE: Any = PACK.NODE_CLASS_MAPPINGS["CaptionImages"]
FACE = {"trigger_word": "ohwx", "prefix": "", "suffix": "", "detail": "short", "existing": "keep"}
FACE |= {"write_to": "text_files"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("captioners")
    write_blip(root / "blip-tiny")
    write_onnx_tagger(root / "wd")
    return root


@pytest.fixture
def home(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDXL_LORA_HOME", str(tmp_path))
    write_pictures(tmp_path / "input/mine", 3)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/captioners").symlink_to(models)
    return tmp_path


def caption(**inputs: Any) -> Any:
    """As ComfyUI calls it: each input as a list."""
    values = {**FACE, "folder": "mine", "captioner": "(connected captions)", **inputs}
    lists = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
    assert NODE.VALIDATE_INPUTS(folder=lists["folder"], captioner=lists["captioner"]) is True
    return NODE().caption(**lists)


def test_a_model_captions_the_folder(home: Path) -> None:
    shown = caption(captioner="blip-tiny", max_tokens=8, beams=1)
    folder, captions, report = shown["result"]
    texts = [(home / f"input/mine/0{n}.txt").read_text("utf-8") for n in range(3)]
    assert folder == "mine" and captions.splitlines() == texts and all(text.startswith("ohwx, ") for text in texts)
    assert [image["by"] for image in json.loads(report)["images"]] == ["blip-tiny"] * 3
    assert shown["ui"]["text"][0].startswith("3 captions written")
    assert len(shown["ui"]["sdxl_lora_table"][0]["rows"]) == 3
    again = caption(captioner="blip-tiny")
    assert again["ui"]["text"][0].startswith("0 captions written, 3 kept, 0 of them written by hand")


def test_a_tagger_captions_the_folder(home: Path) -> None:
    caption(captioner="wd", tag_threshold=0.01, trigger_word="")
    assert all("1girl" in path.read_text() for path in (home / "input/mine").glob("*.txt"))


def test_captions_of_another_node_find_their_images(home: Path) -> None:
    pixels = [np.asarray(Image.open(home / f"input/mine/0{n}.png")) for n in (2, 0)]
    images = [torch.from_numpy(one.astype(np.float32) / 255)[None] for one in pixels]
    caption(captions=["two", "zero"], images=images)
    assert (home / "input/mine/02.txt").read_text() == "ohwx, two"
    assert (home / "input/mine/00.txt").read_text() == "ohwx, zero"
    assert not (home / "input/mine/01.txt").exists()


def test_one_text_with_a_line_for_each_image(home: Path) -> None:
    caption(captions="a\nb\nc\n", write_to="metadata_csv")
    assert (home / "input/mine/metadata.csv").read_text("utf-8").splitlines()[1] == '00.png,"ohwx, a"'


@pytest.mark.parametrize("lines", ["a\nb\nc", "a\n\nc", "\nb\nc", "a\nb\n", "\nb\n"])
def test_the_captions_output_has_a_line_for_each_image_and_can_be_connected(home: Path, lines: str) -> None:
    (home / "input/mine/02.png").rename(home / "input/mine/B.png")
    (home / "input/mine/01.png").rename(home / "input/mine/a.png")
    _, captions, _ = caption(captions=lines)["result"]
    assert captions == "\n".join(line and f"ohwx, {line}" for line in lines.split("\n"))
    before = {path.name: path.read_text("utf-8") for path in (home / "input/mine").glob("*.txt")}
    for path in (home / "input/mine").glob("*.txt"):
        path.unlink()
    assert caption(captions=captions)["result"][1] == captions
    assert before == {path.name: path.read_text("utf-8") for path in (home / "input/mine").glob("*.txt")}


def test_progress_is_told_while_images_are_found_and_captioned(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int, int]] = []

    def tell(_: Any, done: int, total: int, phase: str = "") -> None:
        told.append((phase, done, total))

    monkeypatch.setattr(PACK.nodes.host.progress.Progress, "__call__", tell)
    pixels = np.asarray(Image.open(home / "input/mine/01.png")).astype(np.float32) / 255
    caption(captions=["one"], images=[torch.from_numpy(pixels)[None]])
    assert told == [*(("finding images", n, 3) for n in range(3)), ("captioning", 0, 3), ("captioning", 3, 3)]


def test_what_is_refused(home: Path) -> None:
    with pytest.raises(ValueError, match="captions is not connected: connect it, or choose a model"):
        caption()
    with pytest.raises(ValueError, match="captions has 2 captions and 'mine' has 3 images"):
        caption(captions=["a", "b"])
    with pytest.raises(ValueError, match="is not in ComfyUI's input folder: copy it there to change its captions"):
        caption(folder="sample: 8-bit (bundled)", captions=["a"])
    assert "'gone' was not found: choose a folder with config.json or model.onnx" in NODE.VALIDATE_INPUTS(
        folder=["mine"], captioner=["gone"]
    )
    assert not list((home / "input/mine").glob("*.txt"))


def test_a_changed_folder_or_model_runs_it_again(home: Path) -> None:
    before = NODE.IS_CHANGED(folder=["mine"], captioner=["wd"])
    assert before == NODE.IS_CHANGED(folder=["mine"], captioner=["wd"])
    (home / "input/mine/new.txt").write_text("x")
    assert NODE.IS_CHANGED(folder=["mine"], captioner=["wd"]) != before
    assert NODE.IS_CHANGED(folder=["mine"], captioner=["blip-tiny"]) != NODE.IS_CHANGED(
        folder=["mine"], captioner=["(connected captions)"]
    )


def test_the_hub_is_asked_for_a_named_model_only(home: Path, monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    asked: list[tuple[str, Path]] = []

    def snapshot(hub_id: str, local_dir: Path, allow_patterns: list[str]) -> None:
        asked.append((hub_id, Path(local_dir)))
        assert not [pattern for pattern in allow_patterns if pattern.endswith((".bin", ".pt", ".py"))]
        if hub_id != "someone/gone":
            local_dir.mkdir(parents=True)
            for file in (models / "wd").iterdir():
                (local_dir / file.name).write_bytes(file.read_bytes())

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    root = home / "downloads"
    folder = hub.download_model("someone/wd-tagger", root)
    assert folder == root / "someone--wd-tagger" == hub.download_model("someone/wd-tagger", root)
    assert asked == [("someone/wd-tagger", folder)], "the second time it is there"
    for bad in ("wd", "../x/y", "https://x/y", "a/b/c"):
        with pytest.raises(ValueError, match="hub_id is .*: give owner and name"):
            hub.download_model(bad, root)

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(
        ValueError, match=r"someone/gone could not be downloaded \(no network\): check name and network"
    ):
        hub.download_model("someone/gone", root)
    caption(captioner="wd", tag_threshold=0.01)


def test_captions_are_written_before_the_dataset_is_read(home: Path) -> None:
    """caption_then_train in small: the dataset's folder comes by the link, although another one is chosen."""
    workflow = {
        "1": {
            "class_type": "CaptionImages",
            "inputs": {**FACE, "folder": "mine", "captioner": "wd", "tag_threshold": 0.01},
        },
        "2": {
            "class_type": "LoadCaptionDataset",
            "inputs": {
                **{"folder": "sample: 8-bit (bundled)", "trigger_word": "", "resolution": 64, "validation_percent": 0},
                "captioned_folder": ["1", 0],
            },
        },
    }
    dataset = run(workflow, home)["2"][0][0]
    assert [entry.image.name for entry in dataset.entries] == ["00.png", "01.png", "02.png"]
    assert all(entry.caption.startswith("ohwx, ") for entry in dataset.entries)
