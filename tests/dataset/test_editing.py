"""Captions that are written and taken back, and folders that are made of uploaded files."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from sdxl_lora_core.dataset import editing
from sdxl_lora_core.dataset.caption_dataset import load_caption_dataset
from sdxl_lora_core.dataset.config import DatasetConfig
from sdxl_lora_core.dataset.editing import CaptionWriter, Uploads, check_upload, thumbnail, upload_limit


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "set"
    (found / "images").mkdir(parents=True)
    for name, color in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (400, 300), color).save(found / f"images/{name}.png")
    (found / "images/a.txt").write_bytes("m\u00f6bel".encode("cp1252"))
    return found


def captions(folder: Path) -> dict[str, str]:
    dataset = load_caption_dataset(folder, DatasetConfig(resolution=64, trigger_word="ohwx"))
    return {entry.image.name: entry.caption for entry in dataset.entries}


def test_a_caption_is_written_where_it_is_read(folder: Path) -> None:
    writer = CaptionWriter()
    assert writer.write(folder, "images/a.png", "a chair") == (folder / "images/a.txt", "m\u00f6bel")
    assert writer.write(folder, "images/b.png", "a cat\non a mat") == (folder / "images/b.txt", None)
    assert captions(folder) == {"a.png": "ohwx, a chair", "b.png": "ohwx, a cat on a mat"}
    assert sorted(path.name for path in (folder / "images").iterdir()) == ["a.png", "a.txt", "b.png", "b.txt"]


def test_undo_writes_the_text_before_or_removes_what_was_created(folder: Path) -> None:
    writer = CaptionWriter()
    for image in ("images/a.png", "images/b.png"):
        _, before = writer.write(folder, image, "new")
        assert writer.write(folder, image, before)[1] == "new"
    assert captions(folder) == {"a.png": "ohwx, m\u00f6bel", "b.png": "ohwx"}
    for image in ("images/a.png", "images/b.png"):
        with pytest.raises(ValueError, match="was not created on this page"):
            writer.write(folder, image, None)
    assert captions(folder) == {"a.png": "ohwx, m\u00f6bel", "b.png": "ohwx"}


@pytest.mark.parametrize(
    ("image", "text", "message"),
    [
        ("images/a.png", " \n\t", "is empty"),
        ("images/a.png", "a\0b", "null character"),
        ("images/a.png", "a\ud800", "half a character"),
        ("images/a.png", "\u00f6" * 32769, "takes 65538 bytes"),
        ("a.png", "x", "is no image of the dataset 'set'"),
        ("images/../images/a.png", "x", "is no image"),
        ("images/c.png", "x", "is no image"),
        ("images/a.txt", "x", "is no image"),
        ("", "x", "is no image"),
    ],
)
def test_other_captions_are_refused(folder: Path, image: str, text: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        CaptionWriter().write(folder, image, text)
    assert captions(folder) == {"a.png": "ohwx, m\u00f6bel", "b.png": "ohwx"}


def test_a_caption_never_replaces_a_link_or_a_folder(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    (folder / "images/b.txt").symlink_to(secret)
    with pytest.raises(ValueError, match="or is a link out of it: remove it"):
        CaptionWriter().write(folder, "images/b.png", "x")
    assert secret.read_text() == "secret" and (folder / "images/b.txt").is_symlink()


def upload(uploads: Uploads, folder: Path, name: str, source: Path) -> str:
    upload_limit(name)
    check_upload(name, source)
    copied = folder.parent / ".incoming"
    copied.write_bytes(source.read_bytes())
    return uploads.add(folder, name, copied)


def test_uploaded_files_are_numbered_and_nothing_is_overwritten(folder: Path, tmp_path: Path) -> None:
    uploads, root = Uploads(), tmp_path
    made = uploads.new_folder(root, "set")
    assert made.name == "set_00002" and uploads.find_folder(root, "set_00002") == made
    red, blue = folder / "images/a.png", folder / "images/b.png"
    assert upload(uploads, made, "10_cat/x.png", red) == "10_cat/x.png"
    assert upload(uploads, made, "10_cat/x.png", blue) == "10_cat/x_00002.png"
    assert upload(uploads, made, "10_cat/x.txt", folder / "images/a.txt") == "10_cat/x.txt"
    assert (made / "10_cat/x.png").read_bytes() == red.read_bytes()
    assert (made / "10_cat/x_00002.png").read_bytes() == blue.read_bytes()
    assert captions(made) == {"x.png": "ohwx, m\u00f6bel", "x_00002.png": "ohwx, cat"}
    for other in ("set", "gone", "..", "set_00002/10_cat"):
        with pytest.raises(ValueError, match=r"was not made by an upload|valid relative path"):
            uploads.find_folder(root, other)


def test_an_uploaded_folder_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(editing, "MAX_FOLDER_FILES", 2)
    uploads = Uploads()
    made = uploads.new_folder(tmp_path, "new")
    (made / "a.txt").touch()
    assert uploads.find_folder(tmp_path, "new") == made
    (made / "b.txt").touch()
    with pytest.raises(ValueError, match="new has 2 files, which is the most"):
        uploads.find_folder(tmp_path, "new")


def test_a_link_in_an_uploaded_folder_is_not_followed_out(folder: Path, tmp_path: Path) -> None:
    uploads = Uploads()
    made = uploads.new_folder(tmp_path / "input", "new")
    (made / "out").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="is outside 'new'"):
        upload(uploads, made, "out/a.png", folder / "images/a.png")
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.py", "is not part of a dataset: give an image, .txt"),
        ("a", "is not part of a dataset"),
        ("../a.png", "neither is empty nor begins or ends with a dot"),
        (".a.png", "begins or ends with a dot"),
        ("a//b.png", "is empty"),
        ("a.png ", "ends with a dot or a space"),
        ("C:/a.png", "leave out ':'"),
        ("a\\b.png", "leave out"),
        ("a\0.png", "leave out"),
        ("con.png", "Windows reserves this name"),
        ("a" * 300 + ".png", "takes 304 bytes"),
        ("", "is empty"),
    ],
)
def test_names_of_uploads(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upload_limit(name)


def test_limits_of_uploads() -> None:
    sizes = {upload_limit(name) for name in ("a.PNG", "x/a.webp")}
    assert sizes == {64 * 2**20} and upload_limit("a.txt") == 64 * 1024 and upload_limit("metadata.csv") == 64 * 2**20


def test_uploads_have_what_their_name_says(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"<svg onload='alert(1)'/>\0")
    for name, message in (("a.png", "'a.png' cannot be used: it is not an image"), ("a.txt", "'a.txt' is not text")):
        with pytest.raises(ValueError, match=message):
            check_upload(name, tmp_path / "bad")
    check_upload("a.txt", folder / "images/a.txt")


def test_a_thumbnail_is_a_small_jpeg_of_an_image_inside(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "thumbnail"
    data.write_bytes(thumbnail(folder, "images/a.png"))
    with Image.open(data) as image:
        assert (image.format, image.size) == ("JPEG", (256, 192))
        red, green, blue = image.convert("RGB").getpixel((128, 96))  # type: ignore[misc]
        assert red > 240 and max(green, blue) < 15
    Image.new("RGB", (8, 8)).save(tmp_path / "out.png")
    (folder / "link.png").symlink_to(tmp_path / "out.png")
    for name, message in (("link.png", "is outside 'set'"), ("../out.png", "not a valid"), ("images/a.txt", "no")):
        with pytest.raises(ValueError, match=message):
            thumbnail(folder, name)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        thumbnail(folder, "images/z.png")


def test_the_thumbnail_of_a_damaged_image_is_a_cross(folder: Path, tmp_path: Path) -> None:
    (folder / "images/bad.png").write_bytes(b"no image")
    (tmp_path / "thumbnail").write_bytes(thumbnail(folder, "images/bad.png"))
    with Image.open(tmp_path / "thumbnail") as image:
        assert (image.format, image.size) == ("JPEG", (64, 64)) and image.getcolors(4096) is not None
        red, green, _ = image.convert("RGB").getpixel((32, 32))  # type: ignore[misc]
        assert red > 200 > green
