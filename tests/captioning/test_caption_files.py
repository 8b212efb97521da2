"""Captions where the folder is not simple: odd tables, names and links. Nothing by hand is damaged."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_lora_core.captioning.given import given_captions
from tests.captioning.test_caption_folder import Fake, caption, dataset_captions, texts
from tests.micro.captioners import write_pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "data", 2)
    return tmp_path / "data"


def reasons(folder: Path, **settings: Any) -> dict[str, str]:
    return {problem.file: problem.reason for problem in caption(folder, **settings).problems}


# metadata.csv


@pytest.mark.parametrize("target", ["text_files", "metadata_csv"])
@pytest.mark.parametrize("existing", ["keep", "replace_all"])
@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ("01.png,a cat,on a mat", "line 2 of metadata.csv cannot be read: repair it"),
        (f"01.png,{'x' * 65_537}", "line 2 of metadata.csv cannot be read: repair it"),
        ("01.png,\n01.png,", "it has several lines in metadata.csv: leave one"),
        ("gone.png,x\n01.png,\n01.PNG,by hand", "it has several lines in metadata.csv: leave one"),
        ("01.png,a,b\n01.png,\n01.png,", "it has several lines in metadata.csv: leave one"),
    ],
    ids=["comma", "long", "twice", "twice in another case", "thrice"],
)
def test_rows_that_cannot_be_replaced_stay_and_are_said(
    folder: Path, rows: str, reason: str, existing: str, target: str
) -> None:
    (folder / "metadata.csv").write_text(f"file_name,caption\n{rows}\n", encoding="utf-8")
    assert reasons(folder, existing=existing, write_to=target) == {"01.png": reason}
    lines = (folder / "metadata.csv").read_text("utf-8").splitlines()[1:]
    assert lines == [*rows.split("\n"), *(["00.png,picture 00 run 1"] if target == "metadata_csv" else [])]
    assert texts(folder) == ({} if target == "metadata_csv" else {"00.txt": "picture 00 run 1"})


def test_several_rows_with_a_caption_are_kept_and_said_only_if_they_would_be_replaced(folder: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,caption\n01.png,by hand\n01.png,other\n", encoding="utf-8")
    assert reasons(folder) == {}
    report = caption(folder, existing="replace_all")
    assert [problem.file for problem in report.problems] == ["01.png"] and report.captions["01.png"] == "by hand"


@pytest.mark.parametrize("target", ["text_files", "metadata_csv"])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("file_name,caption\n01.png,café\n".encode("latin-1"), "is not UTF-8, so that writing to it could damage"),
        (f"file_name,caption\n01.png,{'x' * 140_000}\n".encode(), "cannot be read as CSV: field larger than"),
        (b"name,words\n01.png,x\n", "needs a first line with the columns file_name and caption: add them"),
    ],
    ids=["Latin-1", "no CSV", "other columns"],
)
def test_tables_that_cannot_be_written_are_left_as_they_are(
    folder: Path, data: bytes, reason: str, target: str
) -> None:
    (folder / "metadata.csv").write_bytes(data)
    fake = Fake()
    report = caption(folder, fake, existing="replace_all", write_to=target)
    assert [problem.file for problem in report.problems] == ["00.png", "01.png"] and not fake.opened
    assert all(problem.reason.startswith(f"metadata.csv {reason}") for problem in report.problems)
    assert (folder / "metadata.csv").read_bytes() == data and not texts(folder)


def test_a_table_that_is_a_link_out_of_the_folder_is_not_replaced(folder: Path) -> None:
    (folder.parent / "other.csv").write_text("file_name,caption\n", encoding="utf-8")
    (folder / "metadata.csv").symlink_to(folder.parent / "other.csv")
    found = reasons(folder, write_to="metadata_csv")
    assert len(found) == 2 and all("is a link out of it: remove it" in reason for reason in found.values())
    assert (folder / "metadata.csv").is_symlink()


@pytest.mark.parametrize("name", ["Metadata.csv", "METADATA.CSV"])
def test_a_table_with_a_name_in_another_case_is_written_in_place(folder: Path, name: str) -> None:
    (folder / name).write_text("file_name,caption\n01.png,by hand\n", encoding="utf-8")
    assert reasons(folder, existing="replace_all", write_to="metadata_csv") == {}
    assert [path.name for path in folder.glob("[mM]*")] == [name]
    assert dataset_captions(folder) == {f"0{n}.png": f"picture 0{n} run 1" for n in range(2)}


@pytest.mark.parametrize("target", ["text_files", "metadata_csv"])
@pytest.mark.parametrize("data", [b"", b"\n \n", b"\xef\xbb\xbf"], ids=["nothing", "spaces", "mark"])
def test_an_empty_table_is_a_new_one(folder: Path, data: bytes, target: str) -> None:
    (folder / "metadata.csv").write_bytes(data)
    assert reasons(folder, write_to=target) == {}
    assert dataset_captions(folder) == {f"0{n}.png": f"picture 0{n} run 1" for n in range(2)}
    assert len(texts(folder)) == (2 if target == "text_files" else 0)


def test_cells_after_a_space_and_empty_lines_are_understood(folder: Path) -> None:
    table = folder / "metadata.csv"
    table.write_text('licence, caption, file_name\n\nCC0, "by hand, at home", 01.png\n', encoding="utf-8")
    assert reasons(folder, existing="replace_all") == {}
    assert table.read_text("utf-8") == "licence,caption,file_name\nCC0,picture 01 run 1,01.png\n"
    assert texts(folder) == {"00.txt": "picture 00 run 1"}


def test_line_ends_inside_cells_stay_as_they_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on Windows, where text is written with other line ends unless that is said."""
    write_text: Any = Path.write_text

    def as_on_windows(path: Path, data: str, encoding: str, newline: str | None = None) -> int:
        return write_text(path, data, encoding=encoding, newline="\r\n" if newline is None else newline)

    monkeypatch.setattr(Path, "write_text", as_on_windows)
    table = folder / "metadata.csv"
    table.write_bytes(b'file_name,caption,note\r\n01.png,"by\r\nhand","a\r\nb\nc\rd"\r\n')
    for run in (1, 2, 3):
        caption(folder, Fake(run), existing="replace_all")
        assert table.read_bytes() == f'file_name,caption,note\n01.png,picture 01 run {run},"a\r\nb\nc\rd"\n'.encode()


@pytest.mark.parametrize("name", [" before.png", "back\\slash.png"], ids=["space", "backslash"])
def test_names_that_a_table_cannot_have_get_a_text_file(folder: Path, name: str) -> None:
    (folder / "00.png").rename(folder / name)
    assert reasons(folder, write_to="metadata_csv") == {}
    stem = name.removesuffix(".png")
    written = f"picture {stem.strip()} run 1"
    assert " ".join(texts(folder)[f"{stem}.txt"].split()) == written and len(texts(folder)) == 1
    assert dataset_captions(folder) == {name: written, "01.png": "picture 01 run 1"}


# Names, folders and links


def test_images_that_share_a_text_file_are_said(folder: Path) -> None:
    Image.open(folder / "00.png").save(folder / "00.jpg")
    Image.open(folder / "00.png").save(folder / "01.JPG")
    fake = Fake()
    report = caption(folder, fake)
    assert {problem.file: problem.reason for problem in report.problems} == {
        "00.png": "it shares 00.txt with 00.jpg: rename one of them",
        "01.png": "it shares 01.txt with 01.JPG: rename one of them",
    }
    assert fake.asked == report.written == ["00.jpg", "01.JPG"] and len(texts(folder)) == 2


def test_images_that_share_a_text_file_have_rows_of_their_own(folder: Path) -> None:
    Image.open(folder / "00.png").save(folder / "00.jpg")
    assert reasons(folder, write_to="metadata_csv") == {}
    assert dataset_captions(folder)["00.jpg"] == dataset_captions(folder)["00.png"] == "picture 00 run 1"


def test_regularisation_images_get_no_trigger_word(tmp_path: Path) -> None:
    write_pictures(tmp_path / "img/10_cat", 1)
    write_pictures(tmp_path / "reg/1_cat", 1)
    caption(tmp_path, trigger_word="ohwx", prefix="a photo of")
    assert texts(tmp_path) == {
        "img/10_cat/00.txt": "ohwx, a photo of, picture 00 run 1",
        "reg/1_cat/00.txt": "a photo of, picture 00 run 1",
    }


@pytest.mark.parametrize("target", ["text_files", "metadata_csv"])
def test_images_with_decomposed_letters_get_captions(folder: Path, target: str) -> None:
    name = unicodedata.normalize("NFD", "café.png")
    (folder / "00.png").rename(folder / name)
    report = caption(folder, write_to=target)
    assert report.written == ["01.png", "café.png"] and not report.problems
    assert dataset_captions(folder)[name] == "picture café run 1"
    pixels = np.asarray(Image.open(folder / name))
    assert given_captions(folder, ["given"], [pixels]).texts == {"café.png": "given"}


def test_nothing_is_written_through_a_link_out_of_the_folder(tmp_path: Path) -> None:
    root, outside = tmp_path / "data", tmp_path / "outside"
    outside.mkdir()
    write_pictures(root / "images", 1)
    (root / "captions").symlink_to(outside, target_is_directory=True)
    assert reasons(root) == {"images/00.png": "captions is a link out of this folder: remove it"}
    assert not list(outside.iterdir())


def test_a_caption_that_is_deleted_while_the_model_runs_is_written_again(folder: Path) -> None:
    (folder / "01.txt").write_text("by hand", encoding="utf-8")
    report = caption(folder, Fake(meanwhile=(folder / "01.txt").unlink), existing="replace_all")
    assert texts(folder)["01.txt"] == "picture 01 run 1" and report.written == ["00.png", "01.png"]


def test_the_report_is_in_the_order_of_the_folder(folder: Path) -> None:
    (folder / "00.png").rename(folder / "B.png")
    (folder / "01.png").rename(folder / "a.png")
    report = caption(folder)
    assert report.order == ["a.png", "B.png"]
    assert [image["file"] for image in report.as_json()["images"]] == report.order


# Captions from elsewhere


@pytest.mark.parametrize("on_white", [True, False])
def test_given_images_are_found_with_and_without_their_transparency(folder: Path, on_white: bool) -> None:
    colours = Image.open(folder / "00.png")
    alpha = Image.new("L", colours.size, 0)
    alpha.paste(255, (0, 0, 24, 96))
    clear = Image.merge("RGBA", (*colours.split(), alpha))
    clear.save(folder / "00.png")
    seen = Image.composite(colours, Image.new("RGB", colours.size, "white"), alpha) if on_white else colours
    assert given_captions(folder, ["clear"], [np.asarray(seen)]).texts == {"00.png": "clear"}


def test_looking_for_given_images_can_be_cancelled(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    pixels = np.asarray(Image.open(folder / "01.png"))
    given_captions(folder, ["one"], [pixels], lambda *counts: seen.append(counts))
    assert seen == [(0, 2), (1, 2)]

    def cancel(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        given_captions(folder, ["one"], [pixels], cancel)
