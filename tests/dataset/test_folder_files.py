"""Every file of a folder is used, or named with the reason why it is not."""

from __future__ import annotations

import io
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl_lora_core.dataset.caption_dataset import CaptionDataset, _identity, load_caption_dataset
from sdxl_lora_core.dataset.config import DatasetConfig
from sdxl_lora_core.dataset.report import describe

CSV = "file_name,caption\n"


def png(number: int = 0, size: tuple[int, int] = (64, 64)) -> bytes:
    pixels = np.full((size[1], size[0], 3), number % 256, np.uint8)
    pixels[0, 0, 0] = number // 256
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def white() -> bytes:
    data = io.BytesIO()
    Image.new("L", (64, 64), "white").save(data, "PNG")
    return data.getvalue()


def lay(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def load(root: Path, **settings: object) -> CaptionDataset:
    return load_caption_dataset(root, DatasetConfig(**{"resolution": 64, **settings}))  # type: ignore[arg-type]


def roles(dataset: CaptionDataset, root: Path) -> Counter[str]:
    """How often each file of the folder has a role."""
    entries = [*dataset.entries, *dataset.validation, *dataset.regularisation]
    paths = [entry.image for entry in entries]
    paths += {entry.mask for entry in entries if entry.mask and entry.mask != entry.image}
    paths += dataset.caption_files
    names = [path.relative_to(root.resolve()).as_posix() for path in paths]
    skipped = {problem.file.removeprefix(f"{root.name}/") for problem in dataset.problems if problem.skipped}
    return Counter(names + [name for name in skipped if (root / name).is_file()])


def reasons(dataset: CaptionDataset, root: Path) -> dict[str, str]:
    return {p.file.removeprefix(f"{root.name}/"): p.reason for p in dataset.problems}


def captions(dataset: CaptionDataset) -> dict[str, str]:
    return {entry.image.name: entry.caption for entry in dataset.entries}


IGNORED = {
    ".DS_Store": "x",
    ".git/config": "x",
    ".git/objects/aa": "x",
    "__MACOSX/._a.png": "x",
    "@eaDir/a.png/SYNO.png": "x",
    "#recycle/old.png": png(1),
    "$RECYCLE.BIN/old.png": png(2),
    "Thumbs.db": "x",
    "desktop.ini": "x",
}
ODD = {
    "notes.md": "x",
    "cat.npz": "x",
    "model.safetensors": "x",
    "cat.png.txt": "a caption of nothing",
    "orphan.txt": "a caption of nothing",
    "old.txt": "",
}


def plain_folder() -> dict[str, bytes | str]:
    files: dict[str, bytes | str] = {**IGNORED, **ODD}
    for number in range(12):
        files |= {f"{number}.png": png(number), f"{number}.txt": f"number {number}"}
    return files | {
        "sub/a.png": png(20),
        "sub/a.TXT": "in a subfolder",
        "sub/metadata.jsonl": '{"file_name": "b.png", "text": "by metadata"}\n{"file_name": "gone.png", "text": "x"}',
        "sub/b.png": png(21),
        "sub/b.txt": "not this",
        "masks/0.png": white(),
        "mask/1.png": white(),
        "2-masklabel.png": white(),
        "masks/99.png": white(),
        "broken.png": "no image",
        "broken.txt": "a caption",
        "without.png": png(22),
        "photo.heic": "x",
        "photo.txt": "a caption",
        "empty.png": png(23),
        "empty.txt": " ",
        "empty.caption": "the full caption",
    }


def kohya_folder() -> dict[str, bytes | str]:
    files: dict[str, bytes | str] = {**IGNORED, **ODD}
    for number in range(12):
        files |= {f"10_cat/{number}.png": png(number), f"10_cat/{number}.txt": f"number {number}"}
    return files | {
        "5_dog/a.png": png(20),
        "preview.png": png(21),
        "10_cat/unused/a.png": png(22),
        "10_cat/unused/a.txt": "a caption",
        "10_cat/masks/0.png": white(),
        "10_cat/metadata.csv": f"{CSV}1.png,by metadata",
        "0_off/a.png": png(23),
        "10 rabbit/a.png": png(24),
        "_backup/10_cat/0.png": png(25),
        "reg/1_cat/a.png": png(26),
    }


def project_folder() -> dict[str, bytes | str]:
    files: dict[str, bytes | str] = {**IGNORED, **ODD}
    for number in range(12):
        files |= {f"img/10_ohwx cat/{number}.png": png(number), f"img/10_ohwx cat/{number}.txt": f"number {number}"}
        files[f"reg/1_cat/{number}.png"] = png(100 + number)
    return files | {"img/a.png": png(20), "log/x.png": png(21), "model/old.safetensors": "x"}


@pytest.mark.parametrize("make", [plain_folder, kohya_folder, project_folder])
def test_every_file_has_exactly_one_role(tmp_path: Path, make: object) -> None:
    files = make()  # type: ignore[operator]
    root = lay(tmp_path / "set", files)
    dataset = load(root, validation_percent=20)
    found = {Path(folder, name).relative_to(root).as_posix() for folder, _, names in os.walk(root) for name in names}
    counted = roles(dataset, root)
    assert set(counted) == found - set(IGNORED) and set(counted.values()) == {1}
    assert dataset.ignored_files == len(IGNORED) and sum(counted.values()) + len(IGNORED) == len(files)
    assert f"hidden and system files, ignored: {len(IGNORED)}" in describe(dataset)
    assert len(files) >= 40


def test_masks_of_every_naming_are_found_and_those_of_no_image_named(tmp_path: Path) -> None:
    root = lay(tmp_path / "set", plain_folder())
    dataset = load(root)
    masked = {entry.image.name: entry.mask.name for entry in dataset.entries if entry.mask}
    assert masked == {"0.png": "0.png", "1.png": "1.png", "2.png": "2-masklabel.png"}
    assert reasons(dataset, root)["masks/99.png"] == "is a mask of no image here"


def test_a_folder_named_masks_may_be_one_of_images(tmp_path: Path) -> None:
    root = lay(tmp_path / "set", {"masks/a.png": png(), "masks/a.txt": "a venetian mask"})
    assert captions(load(root)) == {"a.png": "a venetian mask"}


def test_captions_are_found_by_metadata_in_subfolders_and_in_another_case(tmp_path: Path) -> None:
    files = {
        "sub/IMG_1.JPG.png": png(1),
        "IMG_2.png": png(2),
        "img_2.txt": "two",
        "sub/Metadata.CSV": f"{CSV}img_1.jpg.png,one",
    }
    assert captions(load(lay(tmp_path / "set", files))) == {"IMG_1.JPG.png": "one", "IMG_2.png": "two"}


def test_an_empty_text_before_a_full_one_is_named_and_the_full_one_used(tmp_path: Path) -> None:
    root = lay(tmp_path / "set", {"a.png": png(), "a.txt": " ", "a.caption": "the full caption"})
    dataset = load(root)
    assert captions(dataset) == {"a.png": "the full caption"}
    assert reasons(dataset, root)["a.txt"] == "is not used: it is empty, or a.png has another caption"


@pytest.mark.parametrize(
    "rows",
    [
        "file_name;caption\na.png;one",
        "file_name\tcaption\na.png\tone",
        "file_name, caption\na.png, one",
        "File_Name,Caption\na.png,one",
        "File Name,TEXT\na.png,one",
        "image,prompt\na.png,one",
        "id,image,prompt\n7,a.png,one",
        "file_name,caption\n./a.png,one",
        "file_name,caption\nimages\\a.png,one",
        "\n\nfile_name,caption\nA.PNG,one",
    ],
)
def test_csv_files_of_other_tools_are_read(tmp_path: Path, rows: str) -> None:
    folder = "images/" if "images" in rows else ""
    root = lay(tmp_path / "set", {f"{folder}a.png": png(), "metadata.csv": rows})
    assert captions(load(root)) == {"a.png": "one"}


def test_a_csv_without_known_columns_is_one_problem_with_those_found(tmp_path: Path) -> None:
    rows = "".join(f"{number}.png,number {number}\n" for number in range(5))
    files: dict[str, bytes | str] = {f"{number}.png": png(number) for number in range(5)}
    root = lay(tmp_path / "set", {**files, "metadata.csv": rows, "z.png": png(9), "z.txt": "used"})
    problems = [p for p in load(root).problems if "metadata.csv" in p.file]
    assert len(problems) == 1
    assert "needs a first line with the columns file_name and caption, it has: 0.png, number 0" in problems[0].reason


def test_an_image_that_is_mostly_cropped_away_is_named(tmp_path: Path) -> None:
    root = lay(tmp_path / "set", {"a.png": png(size=(1200, 20)), "a.txt": "a line", "b.png": png(), "b.txt": "x"})
    report = describe(load(root)).splitlines()
    (line,) = [line for line in report if "of it is trained" in line]
    assert line == "  a.png: 1200x20, 7% of it is trained, at 128x32"


def test_a_square_bucket_of_its_own_changes_the_fingerprint_of_the_images_in_it_only(tmp_path: Path) -> None:
    def identities(resolution: int) -> list[str]:
        files = {"a.png": png(1, (100, 100)), "a.txt": "x", "b.png": png(2, (300, 100)), "b.txt": "x"}
        return [str(_identity(entry)) for entry in load(lay(tmp_path / "set", files), resolution=resolution).entries]

    assert ["square_bucket" in identity for identity in identities(800)] == [True, False]
    assert ["square_bucket" in identity for identity in identities(1024)] == [False, False]
