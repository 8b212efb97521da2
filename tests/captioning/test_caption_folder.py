"""Captions of a folder: what is written where, what is kept, and that nothing is lost when a run is cut off."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_lora_core.captioning import folder_captions
from sdxl_lora_core.captioning.authors import NAME, Authors
from sdxl_lora_core.captioning.caption_folder import CaptionReport, caption_folder, compose
from sdxl_lora_core.captioning.config import CaptionConfig
from sdxl_lora_core.captioning.given import given_captions
from sdxl_lora_core.dataset.caption_dataset import load_caption_dataset
from sdxl_lora_core.dataset.config import DatasetConfig
from sdxl_lora_core.images.crop import fit_image
from tests.micro.captioners import write_pictures


@dataclass
class Fake:
    """Captions each image with its name and the number of the run."""

    run: int = 1
    name: str = "fake"
    opened: int = 0
    asked: list[str] = field(default_factory=list)
    meanwhile: Callable[[], object] = lambda: None

    def open(self) -> None:
        self.opened += 1

    def captions(self, keys: Sequence[str], images: Sequence[np.ndarray]) -> list[str]:
        assert all(image.dtype == np.uint8 and image.ndim == 3 for image in images)
        self.asked += keys
        self.meanwhile()
        return [f"picture {Path(key).stem} run {self.run}" for key in keys]


def caption(folder: Path, captioner: Any = None, *, on_images: Any = lambda *_: None, **settings: Any) -> CaptionReport:
    return caption_folder(folder, captioner or Fake(), CaptionConfig(**{"batch_size": 2, **settings}), on_images)


def texts(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in sorted(folder.rglob("*.txt"))}


def dataset_captions(folder: Path) -> dict[str, str]:
    return {entry.image.name: entry.caption for entry in load_caption_dataset(folder, DatasetConfig()).entries}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "data")
    return tmp_path / "data"


def test_text_files_beside_the_images_are_what_the_dataset_reads(folder: Path) -> None:
    report = caption(folder)
    assert texts(folder) == {f"0{n}.txt": f"picture 0{n} run 1" for n in range(6)}
    assert dataset_captions(folder) == {f"0{n}.png": f"picture 0{n} run 1" for n in range(6)}
    assert report.written == [f"0{n}.png" for n in range(6)] and not report.kept and not report.problems
    assert report.sentences() == ["6 captions written, 0 kept, 0 of them written by hand."]
    assert report.as_json()["images"][0] == {
        "file": "00.png", "caption": "picture 00 run 1", "by": "fake", "written": True,
    }  # fmt: skip


def test_images_in_images_get_captions_in_captions(tmp_path: Path) -> None:
    write_pictures(tmp_path / "images", 2)
    caption(tmp_path)
    assert texts(tmp_path) == {f"captions/0{n}.txt": f"picture 0{n} run 1" for n in range(2)}
    assert len(dataset_captions(tmp_path)) == 2


def test_metadata_csv_has_a_row_for_each(folder: Path) -> None:
    caption(folder, write_to="metadata_csv", suffix='a "quoted", part')
    assert not texts(folder)
    lines = (folder / "metadata.csv").read_text("utf-8").splitlines()
    assert lines[:2] == ["file_name,caption", '00.png,"picture 00 run 1, a ""quoted"", part"']
    assert dataset_captions(folder)["05.png"] == 'picture 05 run 1, a "quoted", part'


def test_other_rows_and_columns_of_metadata_csv_stay(folder: Path) -> None:
    table = folder / "metadata.csv"
    table.write_text("Text;file_name;licence\nby hand;01.png;CC0\n;02.png;CC-BY\nold;gone.png;x\n", encoding="utf-8")
    caption(folder, write_to="metadata_csv")
    lines = table.read_text("utf-8").splitlines()
    assert lines[:4] == [
        "Text;file_name;licence", "by hand;01.png;CC0", "picture 02 run 1;02.png;CC-BY", "old;gone.png;x",
    ]  # fmt: skip
    assert sorted(lines[4:]) == [f"picture 0{n} run 1;0{n}.png;" for n in (0, 3, 4, 5)]


def test_a_caption_in_metadata_csv_stays_there_whatever_is_chosen(folder: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,caption\n01.png,by hand\n", encoding="utf-8")
    caption(folder, existing="replace_all")
    assert (folder / "metadata.csv").read_text("utf-8").splitlines()[1] == "01.png,picture 01 run 1"
    assert len(texts(folder)) == 5 and dataset_captions(folder)["01.png"] == "picture 01 run 1"


def test_captions_of_metadata_jsonl_are_kept_and_said(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "01.png", "text": "by hand"}\n', encoding="utf-8")
    report = caption(folder, existing="replace_all")
    assert report.kept == ["01.png"] and report.problems[0].file == "01.png"
    assert "its caption is in a metadata file other than metadata.csv" in report.problems[0].reason
    assert dataset_captions(folder)["01.png"] == "by hand"


def test_existing_captions(folder: Path) -> None:
    """keep leaves all, replace_generated those by hand and those edited, replace_all none; the notes keep them."""
    caption(folder)
    (folder / "01.txt").write_text("by hand", encoding="utf-8")
    (folder / "02.txt").write_text("picture 02 run 1\n", encoding="utf-8")  # saved by an editor, not edited
    second = Fake(2)
    assert caption(folder, second).kept == [f"0{n}.png" for n in range(6)] and not second.opened
    report = caption(folder, second, existing="replace_generated")
    assert second.asked == ["00.png", "02.png", "03.png", "04.png", "05.png"] and second.opened == 1
    assert texts(folder)["01.txt"] == "by hand" and texts(folder)["02.txt"] == "picture 02 run 2"
    assert "1 kept, 1 of them written by hand" in report.sentences()[0]
    caption(folder, Fake(3, "third"), existing="replace_all")
    assert texts(folder)["01.txt"] == "picture 01 run 3"
    notes = Authors.read(folder)
    assert notes.replaced["01.png"] == [{"text": "by hand", "by": "hand"}]
    assert [entry["by"] for entry in notes.replaced["00.png"]] == ["fake", "fake"]
    assert notes.author("01.png", "picture 01 run 3") == "third"


def test_trigger_word_prefix_and_suffix() -> None:
    config = CaptionConfig(trigger_word="ohwx", prefix="a photo of,", suffix=" white background")
    assert compose("a cat", config) == "ohwx, a photo of, a cat, white background"
    assert compose("OHWX a cat", CaptionConfig(trigger_word="ohwx")) == "OHWX a cat"
    assert compose("a cat", CaptionConfig()) == "a cat"


def test_cancelled_half_way_and_run_again_with_captions_by_hand_in_between(folder: Path) -> None:
    def cancel(done: int, total: int) -> None:
        assert total == 6
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        caption(folder, on_images=cancel)
    assert sorted(texts(folder)) == ["00.txt", "01.txt", "02.txt", "03.txt"]
    (folder / "01.txt").write_text("corrected by hand", encoding="utf-8")
    (folder / "05.txt").write_text("by hand", encoding="utf-8")
    seen: list[tuple[int, int]] = []
    second = Fake(2)
    report = caption(folder, second, on_images=lambda *counts: seen.append(counts))
    assert second.asked == ["04.png"] and seen == [(0, 1), (1, 1)]
    assert texts(folder) == {
        **{f"0{n}.txt": f"picture 0{n} run 1" for n in (0, 2, 3)},
        "01.txt": "corrected by hand", "04.txt": "picture 04 run 2", "05.txt": "by hand",
    }  # fmt: skip
    assert report.authors == {
        **{f"0{n}.png": "fake" for n in (0, 2, 3, 4)}, "01.png": "hand", "05.png": "hand",
    }  # fmt: skip
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize("target", ["text_files", "metadata_csv"])
@pytest.mark.parametrize("existing", ["keep", "replace_all"])
def test_a_full_disk_at_any_write_tears_and_loses_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, target: Any, existing: Any
) -> None:
    """After each number of writes the disk is full: every file is whole, and every caption by hand is still there."""
    by_hand = {f"0{n}.txt": f"by hand {n}" for n in (1, 3)}
    replace = os.replace
    for allowed in range(9):
        for path in [*folder.glob("*.txt"), folder / NAME, folder / "metadata.csv"]:
            path.unlink(missing_ok=True)
        for name, text in by_hand.items():
            (folder / name).write_text(text, encoding="utf-8")
        left = [allowed]

        def full(source: Any, to: Any, left: list[int] = left) -> None:
            if not left[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            left[0] -= 1
            replace(source, to)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            try:
                caption(folder, write_to=target, existing=existing)
            except OSError as error:
                assert error.errno == errno.ENOSPC and "could not write" in str(error)
        notes = Authors.read(folder)
        for name, text in dataset_captions(folder).items():
            assert text in {f"picture {name[:2]} run 1", by_hand.get(f"{name[:2]}.txt")}
            kept = [entry["text"] for entry in notes.replaced.get(name, ())]
            hand = by_hand.get(f"{name[:2]}.txt")
            assert hand is None or hand in (text, *kept)
            assert notes.author(name, text) == ("hand" if text == hand else "fake")
        assert not list(folder.glob(".*.tmp"))
        caption(folder, write_to=target, existing=existing)
        assert len(dataset_captions(folder)) == 6


def test_a_caption_written_by_hand_while_the_model_runs_is_kept(folder: Path) -> None:
    fake = Fake(meanwhile=lambda: (folder / "01.txt").write_text("by hand, just now", encoding="utf-8"))
    report = caption(folder, fake)
    assert texts(folder)["01.txt"] == "by hand, just now" and "01.png" in report.kept
    assert report.authors["01.png"] == "hand" and len(report.written) == 5


def test_an_image_removed_while_the_model_runs(folder: Path) -> None:
    report = caption(folder, Fake(meanwhile=lambda: (folder / "00.png").unlink(missing_ok=True)))
    assert "00.png" not in report.captions and len(report.written) == 5


def test_images_that_cannot_be_read_and_captions_that_are_empty_are_said(folder: Path) -> None:
    (folder / "01.png").write_bytes(b"no image")

    class Silent(Fake):
        def captions(self, keys: Sequence[str], images: Sequence[np.ndarray]) -> list[str]:
            return ["" if key == "03.png" else " a\n cat " for key in keys]

    report = caption(folder, Silent())
    assert texts(folder) == {f"0{n}.txt": "a cat" for n in (0, 2, 4, 5)}
    assert [problem.file for problem in report.problems] == ["01.png", "03.png"]
    assert "fake gave no caption: write one by hand" in report.sentences()[-1]


def test_bad_folders_are_named_before_anything_is_loaded(tmp_path: Path, folder: Path) -> None:
    fake = Fake()
    with pytest.raises(ValueError, match="has no images"):
        caption(tmp_path / "empty" if (tmp_path / "empty").mkdir() else tmp_path / "empty", fake)
    (folder / NAME).write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"is damaged, which says who wrote the captions: repair it, or remove it"):
        caption(folder, fake)
    (folder / NAME).unlink()
    (folder / "00.txt").write_bytes(b"x" * 70_000)
    (folder / "01.txt").mkdir()
    report = caption(folder, fake)
    assert [problem.file for problem in report.problems] == ["00.png", "01.png"] and "00.png" not in fake.asked
    assert fake.opened == 1


def test_notes_are_hidden_from_the_dataset(folder: Path) -> None:
    caption(folder)
    assert not load_caption_dataset(folder, DatasetConfig()).problems
    assert json.loads((folder / NAME).read_text("utf-8"))["captions"]["00.png"]["by"] == "fake"


# Captions from elsewhere


def test_given_captions_in_the_order_of_the_folder(folder: Path) -> None:
    report = caption(folder, given_captions(folder, [f"text {n}" for n in range(6)]))
    assert texts(folder)["03.txt"] == "text 3" and set(report.authors.values()) == {"connected captions"}
    with pytest.raises(ValueError, match="captions has 2 captions and 'data' has 6 images: connect one for each, with"):
        given_captions(folder, ["a", "b"])


def test_given_captions_find_their_images_in_any_order_and_size(folder: Path) -> None:
    images = [np.asarray(Image.open(folder / f"0{n}.png")) for n in (4, 1, 3)]
    images[1] = np.asarray(Image.fromarray(images[1]).resize((56, 48)))
    images[2] = fit_image(images[2], 64, 64)
    report = caption(folder, given_captions(folder, ["four", "one", "three"], images))
    assert texts(folder) == {"01.txt": "one", "03.txt": "three", "04.txt": "four"}
    assert [problem.file for problem in report.problems] == ["00.png", "02.png", "05.png"]
    with pytest.raises(ValueError, match="image 2 of images is not in the folder 'data'"):
        given_captions(folder, ["a", "b"], [images[0], np.eye(32, dtype=np.uint8)[..., None].repeat(3, 2) * 255])
    with pytest.raises(ValueError, match=r"image \d of images is not in the folder"):
        given_captions(folder, ["a", "b"], [images[0], images[0]])
    with pytest.raises(ValueError, match="captions has 1 captions and there are 3 images: connect one for each"):
        given_captions(folder, ["a"], images)


def test_folder_is_read_again_for_each_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans = []
    scan = folder_captions.scan_folder
    monkeypatch.setattr(folder_captions, "scan_folder", lambda root: scans.append(root) or scan(root))
    caption(folder, batch_size=3)
    assert len(scans) == 3
