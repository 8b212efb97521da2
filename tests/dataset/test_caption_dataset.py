import hashlib
import io
import json
import os
import random
import shutil
import struct
import time
import unicodedata
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from sdxl_lora_core.dataset import caption_text, text_files
from sdxl_lora_core.dataset.caption_dataset import load_caption_dataset
from sdxl_lora_core.dataset.caption_text import decode_legacy, legacy_encoding, with_trigger_word
from sdxl_lora_core.dataset.captions import caption_file
from sdxl_lora_core.dataset.config import DatasetConfig
from sdxl_lora_core.dataset.report import checked, contact_sheet, describe, listing
from sdxl_lora_core.images.decode import open_image

SMALL = DatasetConfig(resolution=64)
# Captions by the encoding of the program that wrote them.
LEGACY = json.loads(Path(__file__).with_name("legacy_captions.json").read_text(encoding="utf-8"))


def png(color="red", size=(8, 6), mode="RGB", kind="PNG", **options):
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, kind, **options)
    return buffer.getvalue()


def noisy_jpeg():
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def lay(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def load(folder, files=None, **settings):
    return load_caption_dataset(lay(folder, files or {}), DatasetConfig(**{"resolution": 64, **settings}))


def captions(dataset):
    return {entry.image.name: entry.caption for entry in dataset.entries}


def reasons(dataset):
    return {problem.file.split("/", 1)[1]: problem.reason for problem in dataset.problems}


# layouts


RED, BLUE, HEAD = png(), png("blue"), "file_name,caption\n"


@pytest.mark.parametrize(
    "files",
    [
        {"images/a.png": RED, "images/b.png": BLUE, "captions/a.txt": "one", "captions/b.caption": "two"},
        {"a.png": RED, "a.txt": "one", "b.png": BLUE, "b.caption": "two"},
        {"images/a.png": RED, "images/a.txt": "one", "images/b.png": BLUE, "images/b.TXT": "two"},
        {"a.png": RED, "b.png": BLUE, "metadata.csv": f"{HEAD}a.png,one\nb.png,two\n"},
        {
            "a.png": RED,
            "b.png": BLUE,
            "metadata.jsonl": '{"file_name": "a.png", "text": "one"}\n\n{"file_name": "b.png", "text": "two"}\n',
        },
        {"images/a.png": RED, "images/b.png": BLUE, "metadata.csv": f"{HEAD}images/a.png,one\nb.png,two"},
        {"images/a.png": RED, "images/b.png": BLUE, "images/metadata.csv": f"{HEAD}a.png,one\nb.png,two"},
        {"a.png": RED, "b.png": BLUE, "metadata.csv": "\ufefffile_name,text\r\na.png,one\r\nb.png,two\r\n"},
        {"a.png": RED, "b.png": BLUE, "b.txt": "two", "metadata.csv": f"{HEAD}a.png,one"},
    ],
)
def test_layouts(tmp_path, files):
    dataset = load(tmp_path, files)
    assert captions(dataset) == {"a.png": "one", "b.png": "two"}
    assert dataset.problems == ()


def test_captions_folder_goes_before_a_caption_beside_the_image_and_txt_before_caption(tmp_path):
    files = {"images/a.png": png(), "images/a.txt": "beside", "captions/a.txt": "one", "captions/a.caption": "other"}
    assert captions(load(tmp_path, files)) == {"a.png": "one"}


def test_a_csv_caption_may_have_quotes_commas_and_lines(tmp_path):
    rows = 'file_name,caption\na.png,"one, ""two""\nthree"\n'
    assert captions(load(tmp_path, {"a.png": png(), "metadata.csv": rows})) == {"a.png": 'one, "two" three'}


def test_order_follows_normalised_paths_whatever_the_file_system_says(tmp_path):
    names = ["b.png", "A.png", "sub/c.png", "a 2.png", "ö.png", "z.png"]
    random.Random(0).shuffle(names)
    for name in names:
        lay(tmp_path, {name: png(), name.replace(".png", ".txt"): "x"})
    loaded = [entry.image.relative_to(tmp_path).as_posix() for entry in load(tmp_path).entries]
    assert loaded == ["a 2.png", "A.png", "b.png", "sub/c.png", "z.png", "ö.png"]


def test_names_in_decomposed_unicode_find_their_captions(tmp_path):
    decomposed, composed = (unicodedata.normalize(form, "möbel") for form in ("NFD", "NFC"))
    files = {f"{decomposed}.png": png(), f"{composed}.txt": "a chair"}
    assert list(captions(load(tmp_path, files)).values()) == ["a chair"]
    other = lay(
        tmp_path / "m", {f"{decomposed}.png": png(), "metadata.csv": f"file_name,caption\n{composed}.png,a chair"}
    )
    assert list(captions(load(other)).values()) == ["a chair"]


def test_two_images_of_one_stem_are_both_kept_with_the_same_caption(tmp_path):
    dataset = load(tmp_path, {"a.png": png(), "a.jpg": png(kind="JPEG"), "a.txt": "one"})
    assert [(entry.image.name, entry.caption) for entry in dataset.entries] == [("a.jpg", "one"), ("a.png", "one")]


def test_hidden_files_are_left_alone_and_pictures_beside_images_are_named(tmp_path):
    files = {
        "images/a.png": png(),
        "images/a.txt": "x",
        ".b.png": b"",
        "__MACOSX/c.png": b"",
        ".git/d.png": b"",
        "e.png": png(),
    }
    dataset = load(tmp_path, files)
    assert list(reasons(dataset)) == ["e.png"]
    assert "outside images/" in reasons(dataset)["e.png"]


# pixels


def opened(tmp_path, data, name="x.png"):
    return open_image(next(lay(tmp_path, {name: data}).iterdir()))


def near(found, wanted, tolerance=0):
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True)) <= tolerance


def test_exif_orientation_turns_pixels_and_size(tmp_path):
    image = Image.new("RGB", (8, 6), "blue")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    upright = opened(tmp_path, buffer.getvalue())
    assert upright.size == (6, 8) and upright.getpixel((5, 0)) == (255, 0, 0)
    entry = load(tmp_path, {"x.txt": "one"}).entries[0]
    assert (entry.width, entry.height) == (6, 8)


@pytest.mark.parametrize(
    ("color", "mode", "wanted"),
    [((255, 0, 0, 0), "RGBA", (255, 255, 255)), ((255, 0, 0, 255), "RGBA", (255, 0, 0)), ((0, 128), "LA", (127,) * 3)],
)
def test_transparent_parts_lie_on_white(tmp_path, color, mode, wanted):
    assert near(opened(tmp_path, png(color, mode=mode)).getpixel((0, 0)), wanted, 1)


def test_palettes_with_and_without_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    buffers = [io.BytesIO() for _ in range(3)]
    image.save(buffers[0], "PNG")
    image.save(buffers[1], "PNG", transparency=0)
    image.save(buffers[2], "GIF", transparency=1)
    pixels = [[opened(tmp_path / str(i), b.getvalue()).getpixel((x, 0)) for x in (0, 1)] for i, b in enumerate(buffers)]
    red, blue, white = (255, 0, 0), (0, 0, 255), (255, 255, 255)
    assert pixels == [[red, blue], [white, blue], [red, white]]


def test_a_colour_key_is_transparency_too(tmp_path):
    assert opened(tmp_path, png("red", transparency=(255, 0, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_cmyk_grey_and_black_and_white(tmp_path):
    assert near(
        opened(tmp_path / "c", png((0, 255, 255, 0), mode="CMYK", kind="JPEG"), "c.jpg").getpixel((0, 0)),
        (255, 0, 0),
        4,
    )
    assert opened(tmp_path / "l", png(77, mode="L")).getpixel((0, 0)) == (77,) * 3
    assert opened(tmp_path / "1", png(1, mode="1")).getpixel((0, 0)) == (255,) * 3


@pytest.mark.parametrize(("mode", "kind"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I;16B", "TIFF"), ("I", "TIFF")])
def test_deep_grey_keeps_its_range(tmp_path, mode, kind):
    buffer = io.BytesIO()
    values = [0, 128 * 257, 65535]
    if mode == "I":
        image = Image.fromarray(np.array([values], dtype=np.int32))
    else:
        image = Image.frombytes(mode, (3, 1), struct.pack((">" if mode.endswith("B") else "<") + "3H", *values))
    image.save(buffer, kind)
    image = opened(tmp_path, buffer.getvalue(), f"x.{kind.lower()}")
    assert image.mode == "RGB" and [image.getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (128,) * 3, (255,) * 3]


def test_float_pixels_are_refused_by_name(tmp_path):
    buffer = io.BytesIO()
    Image.new("F", (4, 4), 0.5).save(buffer, "TIFF")
    with pytest.raises(ValueError, match="x.tif cannot be used: its pixels have 32 bits"):
        opened(tmp_path, buffer.getvalue(), "x.tif")


def test_a_colour_profile_is_honoured_and_a_broken_one_ignored(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = profile.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
    for old, new in ((b"rXYZ", b"tmp!"), (b"bXYZ", b"rXYZ"), (b"tmp!", b"bXYZ")):
        swapped = swapped.replace(old, new, 1)
    pixels = {
        name: opened(tmp_path / name, png("red", icc_profile=data)).getpixel((0, 0))
        for name, data in {"srgb": profile, "swapped": swapped, "broken": b"no profile"}.items()
    }
    assert pixels["srgb"] == pixels["broken"] == (255, 0, 0)
    assert near(pixels["swapped"], (0, 0, 255), 2)


def test_an_animation_gives_its_first_frame(tmp_path):
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert opened(tmp_path, buffer.getvalue(), "x.gif").getpixel((0, 0)) == (255, 0, 0)


# what cannot be used


def test_broken_files_are_skipped_and_named(tmp_path):
    whole = png(size=(64, 64))
    flipped = bytearray(whole)
    flipped[whole.index(b"IDAT") + 10] ^= 255
    jpeg = noisy_jpeg()
    bad = {
        "empty.png": b"",
        "text.png": "not an image",
        "half.png": whole[: len(whole) // 2],
        "endless.png": whole[: whole.index(b"IEND") - 4],
        "flipped.png": bytes(flipped),
        "half.jpg": jpeg[: len(jpeg) // 2],
        "phone.heic": b"\0\0\0\x18ftypheic",
        "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    }
    for name in bad:
        lay(tmp_path, {name.rsplit(".", 1)[0] + ".txt": "x"})
    dataset = load(tmp_path, {"good.png": whole, "good.txt": "x", **bad})
    assert [entry.image.name for entry in dataset.entries] == ["good.png"]
    assert set(reasons(dataset)) == set(bad)
    assert all(reason.startswith("cannot be used: ") for reason in reasons(dataset).values())
    assert "truncated" in reasons(dataset)["half.jpg"]
    assert "not an image" in reasons(dataset)["text.png"] and "not an image" in reasons(dataset)["script.png"]


def test_oversized_pictures_are_refused_before_they_are_decoded(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def header(width, height):  # a PNG that claims a size and has next to no pixels
        size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"x") + chunk(b"IEND", b"")

    bad = {"area.png": header(9000, 9000), "side.png": header(16385, 1), "bomb.png": header(60000, 60000)}
    dataset = load(tmp_path, {"a.png": png(), **bad, **{f"{n}.txt": "x" for n in ("a", "area", "side", "bomb")}})
    assert set(reasons(dataset)) == set(bad)
    assert "9000x9000 is too large: scale it down to at most 64 megapixels and 16384" in reasons(dataset)["area.png"]
    assert "16385x1" in reasons(dataset)["side.png"] and "60000x60000" in reasons(dataset)["bomb.png"]


def test_pillow_switches_set_by_others_neither_matter_nor_change(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    jpeg = noisy_jpeg()
    files = {"good.jpg": jpeg, "good.txt": "x", "half.jpg": jpeg[: len(jpeg) // 2], "half.txt": "x"}
    dataset = load(tmp_path, files)
    assert captions(dataset) == {"good.jpg": "x"} and list(reasons(dataset)) == ["half.jpg"]
    with pytest.raises(ValueError, match="half.jpg"):
        open_image(tmp_path / "half.jpg")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True and Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_random_damage_is_a_value_error_or_a_picture(tmp_path, kind):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind, **({"compression": "tiff_lzw"} if kind == "TIFF" else {}))
    dice, refused = random.Random(0), 0
    for _ in range(60):
        data = bytearray(buffer.getvalue())
        for _ in range(dice.choice((1, 3, 20))):
            data[dice.randrange(len(data))] = dice.randrange(256)
        try:
            assert opened(tmp_path, bytes(data[: dice.choice((None, -40))]), "x.bin").mode == "RGB"
        except ValueError as error:
            assert "x.bin cannot be used" in str(error)
            refused += 1
    assert refused > 10


def test_a_picture_that_is_gone_is_a_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="x.png does not exist"):
        open_image(tmp_path / "x.png")


def test_links_may_lead_around_inside_the_folder_but_not_out(tmp_path):
    outside = lay(tmp_path / "outside", {"secret.png": png(), "secret.txt": "secret"})
    folder = lay(tmp_path / "data", {"a.png": png(), "a.txt": "one", "c.png": png(), "linked.txt": "two"})
    (folder / "out.png").symlink_to(outside / "secret.png")
    (folder / "c.txt").symlink_to(outside / "secret.txt")
    (folder / "linked.png").symlink_to(folder / "a.png")
    (folder / "gone.png").symlink_to(folder / "nothing.png")
    (folder / "more").symlink_to(outside, target_is_directory=True)
    dataset = load(folder)
    assert captions(dataset) == {"a.png": "one", "linked.png": "two"}
    found = reasons(dataset)
    assert set(found) == {"out.png", "c.txt", "c.png", "gone.png", "more"}
    assert "outside the folder" in found["out.png"] and "outside the folder" in found["c.txt"]
    assert "broken link" in found["gone.png"] and "not followed" in found["more"]


def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="a.txt is not a file"):
        load(tmp_path, {"a.png": png()})


# captions


@pytest.mark.parametrize(
    ("data", "caption", "doubt"),
    [
        ("ein Möbel".encode(), "ein Möbel", None),
        ("ein Möbel".encode("utf-8-sig"), "ein Möbel", None),
        ("ein Möbel".encode("utf-16"), "ein Möbel", None),
        ("\ufeffein Möbel".encode("utf-16-be"), "ein Möbel", None),
        ("\ufeffein Möbel".encode("utf-32-le"), "ein Möbel", None),
        ("ein Möbel “x”".encode("cp1252"), "ein Möbel “x”", "not UTF-8"),
        ("ein Möbel".encode("latin-1") + b" \x81", "ein Möbel", "latin-1"),
        (b"  a  b\r\n\tc \x1b[31md\0"[:-1], "a b c [31md", None),
    ],
)
def test_caption_encodings(tmp_path, data, caption, doubt):
    dataset = load(tmp_path, {"a.png": png(), "a.txt": data})
    assert captions(dataset) == {"a.png": caption}
    assert [(problem.skipped, doubt in problem.reason) for problem in dataset.problems] == (
        [(False, True)] if doubt else []
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ("ab".encode("utf-16-le"), "without a byte order mark"),
        (b"\xff\xfea", "not valid utf-16"),
        ("x" * (64 * 1024 + 1), "larger than 64 KiB"),
        (None, "no caption: write one to images/a.txt"),
    ],
)
def test_images_whose_caption_cannot_be_used_are_skipped_and_named(tmp_path, data, reason):
    files = {"good.png": png(), "good.txt": "x", "images2/a.png": png()}
    if data is not None:
        files["images2/a.txt"] = data
    found = reasons(load(tmp_path, files))
    assert list(found) == ["images2/a.png"] and reason.replace("images/", "images2/") in found["images2/a.png"]


def test_a_caption_of_exactly_the_limit_is_read(tmp_path):
    text = "x " * (32 * 1024)
    assert captions(load(tmp_path, {"a.png": png(), "a.txt": text}))["a.png"] == text.strip()


@pytest.mark.parametrize(
    ("encoding", "texts"),
    LEGACY.items(),
)
def test_captions_of_older_programs_are_read(tmp_path, encoding, texts):
    """The encoding is detected from all captions of the folder, and large files in UTF-8 do not hide it."""
    (tmp_path / "metadata.csv").write_text(
        "file_name,caption\n" + "gone.png,\u9752\u3044\u9aea\n" * 5000, encoding="utf-8"
    )
    files = {f"{number}.txt": text.encode(encoding) for number, text in enumerate([*texts, "plain"])}
    dataset = load(tmp_path, {**files, **{f"{number}.png": png((number, 0, 0)) for number in range(len(files))}})
    assert [*captions(dataset).values()] == [*texts, "plain"]
    assert [problem.reason for problem in dataset.problems if "gone.png" not in problem.reason] == [
        f"is not UTF-8 and was read as {encoding}: check its letters and save it as UTF-8"
    ] * len(texts)


WESTERN = [
    "é",
    "Ä",
    "ß",
    "50° angle",
    "© 2020 Getty",
    "price £5",
    "5×5 grid",
    "maçã vermelha",
    "“café…”",
    "étés",
    "«été»",
]


@pytest.mark.parametrize("text", [*WESTERN, "São João, ações", "Ærø, Ålborg blå øjne"])
def test_a_short_western_caption_is_western(text):
    data = text.encode("cp1252")
    assert decode_legacy(data, legacy_encoding([data])) == (text, "cp1252")


@pytest.mark.parametrize("usual", ["cp1251", "cp932", "gb18030"])
def test_a_western_caption_among_others_is_western(usual):
    for text in ("une rue à Paris, été", "maçã vermelha", "50° angle", "größer Spaß", "œuvre d’art"):
        assert decode_legacy(text.encode("cp1252"), usual)[0] == text


@pytest.mark.parametrize("text", [LEGACY["cp932"][0], LEGACY["cp1251"][0]])
def test_a_foreign_caption_among_western_ones_is_detected_alone(text):
    data = text.encode("cp932" if text > "\u044f" else "cp1251")
    assert decode_legacy(data, "cp1252")[0] == text


def test_a_caption_that_was_cut_within_a_character_is_named(tmp_path):
    text = "une rue à Paris, été, gelé".encode()[:-1]
    dataset = load(tmp_path, {"a.png": png(), "a.txt": text, "b.png": png("blue"), "b.txt": "b"})
    assert reasons(dataset) == {"a.png": "a.txt is UTF-8 with damaged characters (1): write it again"}


def test_without_charset_normalizer_they_are_western_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(caption_text, "can_detect_encodings", lambda: False)
    monkeypatch.setattr(text_files, "can_detect_encodings", lambda: False)
    dataset = load(tmp_path, {"a.png": png(), "a.txt": "\u732b".encode("cp932")})
    (problem,) = dataset.problems
    assert "was read as cp1252" in problem.reason and "python -m pip install charset-normalizer" in problem.reason


def test_metadata_problems_are_named_with_their_line(tmp_path):
    rows = [
        '{"file_name": "a.png", "text": "one"}',
        '{"file_name": "gone.png", "text": "x"}',
        '{"file_name": "../outside.png", "text": "x"}',
        '{"file_name": "/etc/passwd", "text": "x"}',
        "{broken",
        '["a.png"]',
        '{"file_name": "b.png"}',
        '{"file_name": "a.png", "text": "two"}',
        '{"file_name": "a.png", "text": "one"}',
        '{"file_name": "c.png", "text": " "}',
        '{"file_name": "\\ud800.png", "text": "x"}',
    ]
    lay(tmp_path, {"outside.png": png()})
    files = {
        "a.png": png(),
        "b.png": png(),
        "b.txt": "from its text file",
        "c.png": png(),
        "metadata.jsonl": "\n".join(rows),
    }
    dataset = load(lay(tmp_path / "data", files))
    assert captions(dataset) == {"a.png": "one", "b.png": "from its text file"}
    found = reasons(dataset)
    lines = {f"metadata.jsonl line {number}" for number in (2, 3, 4, 5, 6, 7, 8, 11)}
    assert set(found) == lines | {"c.png"}
    assert "'gone.png'" in found["metadata.jsonl line 2"]
    assert "'../outside.png' is not a valid relative path" in found["metadata.jsonl line 3"]
    assert "'/etc/passwd' is not a valid relative path" in found["metadata.jsonl line 4"]
    assert "not JSON" in found["metadata.jsonl line 5"] and "a different caption" in found["metadata.jsonl line 8"]


def test_an_unquoted_comma_in_a_csv_is_a_problem_and_not_a_shorter_caption(tmp_path):
    rows = "file_name,caption\na.png,one\nb.png,two, three\n"
    dataset = load(tmp_path, {"a.png": png(), "b.png": png(), "metadata.csv": rows})
    assert captions(dataset) == {"a.png": "one"}
    assert "double quotes" in reasons(dataset)["metadata.csv line 3"]


def test_metadata_in_utf16_is_read_and_a_broken_one_named(tmp_path):
    rows = "file_name,caption\na.png,möbel\n"
    assert captions(load(tmp_path / "a", {"a.png": png(), "metadata.csv": rows.encode("utf-16")})) == {"a.png": "möbel"}
    dataset = load(tmp_path / "b", {"a.png": png(), "a.txt": "x", "metadata.csv": b"\xff\xfea"})
    assert "not valid utf-16" in reasons(dataset)["metadata.csv"]


def test_captions_from_json_are_valid_unicode(tmp_path):
    row = '{"file_name": "a.png", "text": "x \\ud800 y"}'
    dataset = load(tmp_path, {"a.png": png(), "metadata.jsonl": row})
    assert captions(dataset) == {"a.png": "x ? y"} and describe(dataset).encode()


# nothing to train on


def test_missing_empty_and_useless_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="'nowhere' does not exist"):
        load_caption_dataset(tmp_path / "nowhere", SMALL)
    with pytest.raises(ValueError, match="'a.txt' is a file"):
        load_caption_dataset(lay(tmp_path, {"a.txt": "x"}) / "a.txt", SMALL)
    with pytest.raises(ValueError, match="'empty' contains no images"):
        load(lay(tmp_path / "empty", {"readme.md": "x"}))
    files = {f"{i}.png": "broken" for i in range(7)} | {f"{i}.txt": "x" for i in range(6)}
    with pytest.raises(
        ValueError, match=r"none of the 7 images .*'broken'.*/6.png has no caption.*/0.png and 5 others cannot"
    ):
        load(lay(tmp_path / "broken", files))


# settings


def test_trigger_word_comes_first_unless_it_is_there():
    assert with_trigger_word("a red cat", "pxl") == "pxl, a red cat"
    assert with_trigger_word("A PXL cat", "pxl") == "A PXL cat"
    assert with_trigger_word("a category", "cat") == "cat, a category"
    assert with_trigger_word("a bobcat", "cat") == "cat, a bobcat"
    assert with_trigger_word("8-bit cat", "8-bit") == "8-bit cat"
    assert with_trigger_word("a cat", " \n") == "a cat"
    assert with_trigger_word("c++ code", "c++") == "c++ code"


def test_the_trigger_word_is_the_caption_of_images_without_one(tmp_path):
    files = {"a.png": png(), "b.png": png("blue"), "c.png": png("green"), "c.txt": "a leaf", "d.png": "bad"}
    dataset = load(tmp_path, files, trigger_word=" ohwx ")
    assert captions(dataset) == {"a.png": "ohwx", "b.png": "ohwx", "c.png": "ohwx, a leaf"}
    assert [entry.written for entry in dataset.entries] == [(), (), ("a leaf",)]
    assert [entry.caption_file and entry.caption_file.name for entry in dataset.entries] == [None, None, "c.txt"]
    notes = [problem for problem in dataset.problems if not problem.skipped]
    assert [problem.file for problem in notes] == [tmp_path.name]
    assert notes[0].reason == "2 images have no caption file: the trigger word 'ohwx' is their caption"
    assert list(reasons(replace(dataset, problems=dataset.problems[:1]))) == ["d.png"]


def test_an_empty_caption_is_a_mistake_even_with_a_trigger_word(tmp_path):
    dataset = load(tmp_path, {"a.png": png(), "a.txt": " \n", "b.png": png("blue")}, trigger_word="ohwx")
    assert captions(dataset) == {"b.png": "ohwx"}
    assert reasons(replace(dataset, problems=dataset.problems[:1])) == {
        "a.png": "its caption a.txt is empty: describe what the image shows"
    }
    assert dataset.problems[1].reason == "1 image has no caption file: the trigger word 'ohwx' is its caption"


@pytest.mark.parametrize("word", ["", " \n"])
def test_without_a_trigger_word_images_without_captions_are_refused(tmp_path, word):
    with pytest.raises(ValueError, match=r"/a.png has no caption: write one to a.txt\. A trigger_word would be"):
        load(tmp_path, {"a.png": png()}, trigger_word=word)


def test_captions_do_not_depend_on_where_they_are_written(tmp_path):
    beside = load(lay(tmp_path / "beside", {"a.png": png(), "a.txt": "one"}), trigger_word="ohwx")
    listed = load(lay(tmp_path / "listed", {"a.png": png(), "metadata.csv": f"{HEAD}a.png,one"}), trigger_word="ohwx")
    assert beside.fingerprint == listed.fingerprint and listed.entries[0].caption_file is None


def test_the_file_to_write_a_caption_to(tmp_path):
    files = {"images/a.png": png(), "captions/a.txt": "", "images/a.caption": "x", "images/b.png": png()}
    root = lay(tmp_path / "set", files | {"images/c.png": png(), "images/metadata.csv": f"{HEAD}c.png,one"})
    assert caption_file(root, "images/a.png") == root / "images/a.caption", "the first that is not empty"
    assert caption_file(root, "images/b.png") == root / "images/b.txt"
    with pytest.raises(ValueError, match=r"images/c.png is in a metadata file .* change it there"):
        caption_file(root, "images/c.png")
    with pytest.raises(FileNotFoundError, match="'../set/images/a.png' is no image of the dataset 'set'"):
        caption_file(root, "../set/images/a.png")


def test_settings_reach_every_entry(tmp_path):
    files = {"a.png": png(size=(80, 40)), "a.txt": "one", "b.png": png(), "b.txt": "a pxl"}
    dataset = load(tmp_path, files, trigger_word=" pxl ", repeats=3, flip=True, resolution=128)
    assert captions(dataset) == {"a.png": "pxl, one", "b.png": "a pxl"}
    assert {(entry.repeats, entry.flip, entry.resolution) for entry in dataset.entries} == {(3, True, 128)}
    assert dataset.trigger_words == ("pxl",) and dataset.name == tmp_path.name
    assert (dataset.entries[0].width, dataset.entries[0].height, dataset.entries[0].bucket) == (80, 40, (160, 96))


def test_chained_datasets_come_one_after_the_other_with_their_own_settings(tmp_path):
    one = load(
        tmp_path / "one", {"a.png": png(), "a.txt": "x", "z.png": "bad", "z.txt": "x"}, trigger_word="t1", repeats=2
    )
    lay(tmp_path / "two", {"a.png": png("blue"), "a.txt": "y", "b.png": png("lime"), "b.txt": "y"})
    config = DatasetConfig(resolution=128, trigger_word="t2", validation_percent=50)
    both = load_caption_dataset(tmp_path / "two", config, chained=one)
    assert both.entries[0] == one.entries[0] and len(both.entries) == 2 and len(both.validation) == 1
    assert [(e.repeats, e.resolution) for e in both.entries] == [(2, 64), (1, 128)]
    assert both.trigger_words == ("t1", "t2") and both.name == "one + two"
    assert [problem.file for problem in both.problems] == ["one/z.png"]
    again = load_caption_dataset(tmp_path / "one", DatasetConfig(resolution=64, trigger_word="t1"), chained=one)
    assert again.trigger_words == ("t1",) and again.fingerprint not in (one.fingerprint, both.fingerprint)


def many(folder, count):
    return lay(
        folder,
        {f"{i:02}.png": png((i, 0, 0)) for i in range(count)} | {f"{i:02}.txt": f"number {i}" for i in range(count)},
    )


@pytest.mark.parametrize(
    ("count", "percent", "held_out"),
    [(1, 50, 0), (2, 1, 1), (2, 50, 1), (20, 0, 0), (20, 10, 2), (20, 1, 1), (3, 50, 2)],
)
def test_validation_share_leaves_something_to_train_on(tmp_path, count, percent, held_out):
    dataset = load(many(tmp_path, count), validation_percent=percent)
    assert (len(dataset.validation), len(dataset.entries)) == (held_out, count - held_out)
    assert not {entry.sha256 for entry in dataset.validation} & {entry.sha256 for entry in dataset.entries}


def test_validation_goes_by_content_not_by_name_and_keeps_copies_together(tmp_path):
    first = load(many(tmp_path / "a", 20), validation_percent=20)
    for i in range(20):
        (tmp_path / "a" / f"{i:02}.png").rename(tmp_path / "a" / f"{99 - i}.png")
        (tmp_path / "a" / f"{i:02}.txt").rename(tmp_path / "a" / f"{99 - i}.txt")
    renamed = load(tmp_path / "a", validation_percent=20)
    assert {entry.sha256 for entry in renamed.validation} == {entry.sha256 for entry in first.validation}
    copies = many(tmp_path / "b", 4)
    for i in range(4):
        shutil.copy(copies / f"{i:02}.png", copies / f"copy{i}.png")
        lay(copies, {f"copy{i}.txt": "copy"})
    dataset = load(copies, validation_percent=25)
    assert len(dataset.validation) == 2 and len({entry.sha256 for entry in dataset.validation}) == 1


def test_fingerprint_is_over_content_and_settings_not_paths_and_times(tmp_path):
    first = load(many(tmp_path / "a", 4))
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere")
    os.utime(tmp_path / "elsewhere" / "00.png", (1, 1))
    assert load(tmp_path / "elsewhere").fingerprint == first.fingerprint
    changes = [
        dict(trigger_word="t"),
        dict(repeats=2),
        dict(flip=True),
        dict(resolution=128),
        dict(validation_percent=25),
    ]
    others = {load(tmp_path / "a", **change).fingerprint for change in changes}
    others.add(load(tmp_path / "a", {"00.txt": "another"}).fingerprint)
    others.add(load(tmp_path / "a", {"00.txt": "number 0", "00.png": png("white")}).fingerprint)
    assert len(others | {first.fingerprint}) == 8
    # A trigger word that every caption has already changes no caption, but what is written into the LoRA.
    assert load(tmp_path / "elsewhere", trigger_word="number").fingerprint != first.fingerprint


def test_hashes_are_of_the_files_and_remembered(tmp_path):
    folder, memo = many(tmp_path / "a", 2), tmp_path / "memo"
    time.sleep(0.06)
    loaded = [load_caption_dataset(folder, SMALL, hash_memo=memo) for _ in range(2)]
    assert loaded[0] == loaded[1] and len(list(memo.iterdir())) == 2
    assert loaded[0].entries[0].sha256 == hashlib.sha256((folder / "00.png").read_bytes()).hexdigest()


# what a person sees


def test_report_says_what_was_found(tmp_path):
    files = {
        "a.png": png(size=(40, 40)),
        "a.txt": "one",
        "b.png": png(size=(256, 128)),
        "b.txt": "two",
        "c.png": "bad",
        "c.txt": "x",
        "d.png": png(size=(90, 90)),
        "d.txt": b"m\xf6bel",
    }
    report = describe(load(lay(tmp_path / "set", files), trigger_word="pxl", repeats=2, resolution=64))
    lines = report.splitlines()
    assert lines[:2] == ["skipped: 1", lines[1]] and lines[1].startswith("  set/c.png: cannot be used")
    assert lines[2] == "used, but check: 1" and lines[3].startswith("  set/d.txt: is not UTF-8")
    assert lines[4] == f"3 images to train on, 6 in an epoch with repeats, from {tmp_path / 'set'}"
    assert "trigger words: pxl" in lines and "resolution: 64" in lines
    assert [line.split() for line in lines if " x " in line][1:] == [
        ["64", "x", "64", "2", "4"],
        ["80", "x", "48", "1", "2"],
    ]
    assert any(line.startswith("smaller than their bucket") and line.endswith(": 1") for line in lines)
    assert "  a.png: 40x40, trained at 64x64" in lines


def test_the_report_of_a_good_folder_starts_with_its_count_and_path(tmp_path):
    one, two = (many(tmp_path / name, 2) for name in ("one", "two"))
    both = load_caption_dataset(two, SMALL, load(one))
    assert describe(load(one)).splitlines()[0] == f"2 images to train on, from {one}"
    assert describe(both).splitlines()[0] == f"4 images to train on, from {one} and {two}"
    assert "validation" not in describe(both)
    assert "validation: 1 image\n" in describe(load(one, validation_percent=50))


def test_a_folder_is_listed_with_its_captions_before_anything_is_decoded(tmp_path):
    files = {"sub/a.png": png(), "sub/a.txt": "one\ntwo", "b.png": png("blue"), "c.png": "bad", "x.txt": "of none"}
    folder = lay(tmp_path / "set", files)
    found = listing(folder)
    entries = {entry.pop("name"): entry for entry in found.pop("entries")}
    assert all(entry.pop("version").isdigit() for entry in entries.values())
    assert entries == {
        "sub/a.png": {"caption": "one\ntwo", "used": True},
        "b.png": {"caption": "", "used": False},
        "c.png": {"caption": "", "used": False},
    }
    assert (found["total"], found["unused"], found["notes"]) == (3, 2, [])
    assert [line.split(":")[0] for line in found["problems"]] == ["set/x.txt"]
    assert listing(folder, " ohwx ")["unused"] == 0


def test_the_list_has_the_first_images_and_their_number(tmp_path):
    folder = lay(many(tmp_path, 5), {f"{i}.txt": "of none" for i in range(70, 140)})
    found = listing(folder, limit=3)
    assert len(found["entries"]) == 3 and found["total"] == 5
    assert len(found["problems"]) == 4 and found["problems"][-1] == "... and 67 more"


def test_what_a_run_finds_besides_has_no_line_for_each_image_without_a_caption(tmp_path):
    files = {"a.png": png(), "a.txt": "one", "b.png": png("blue"), "c.png": "bad", "c.txt": "x"}
    first = load(lay(tmp_path / "first", {"d.png": png("red")}), trigger_word="ohwx")
    found = checked(load_caption_dataset(lay(tmp_path / "set", files), SMALL, first))
    assert [line.split(":")[0] for line in found["problems"]] == ["set/c.png"]
    assert found["notes"] == ["first: 1 image has no caption file: the trigger word 'ohwx' is its caption"]


def test_long_lists_in_the_report_are_cut_with_their_count(tmp_path):
    files = {f"{i}.png": "bad" for i in range(9)} | {f"{i}.txt": "x" for i in range(9)}
    dataset = load(tmp_path, {"good.png": png(size=(64, 64)), "good.txt": "x", **files})
    report = describe(dataset, limit=3)
    assert "skipped: 9" in report and "  ... and 6 more" in report and report.count("cannot be used") == 3


def test_contact_sheet_shows_pictures_with_text_and_counts_the_rest(tmp_path):
    few = contact_sheet(load(many(tmp_path / "few", 4)))
    assert few.mode == "RGB" and few.width < few.height < 1000
    pixels = np.asarray(few).reshape(-1, 3)
    for red in range(4):
        assert (pixels == (red, 0, 0)).all(axis=1).sum() >= 256 * 190  # 8x6 px pictures fitted into 256x256
    dataset = load(many(tmp_path / "many", 30), validation_percent=10)
    full, cut = contact_sheet(dataset, limit=30), contact_sheet(dataset)
    assert cut.width == full.width < 2000 and cut.height < full.height
    shown = {int(value) for value in np.unique(np.asarray(cut)[..., 0][(np.asarray(cut)[..., 1:] == 0).all(-1)])}
    assert len(shown) == 24


def test_contact_sheet_writes_the_caption_below_the_picture(tmp_path):
    sheets = [
        np.asarray(contact_sheet(load(tmp_path / str(i), {"a.png": png(size=(64, 64)), "a.txt": text})))
        for i, text in enumerate(("one", "a caption of so many words that it needs several lines " * 9, "\u6f22\u5b57"))
    ]
    assert len({sheet.shape for sheet in sheets}) == 1
    below = [(sheet[280:360, :, 0] < 100).sum() for sheet in sheets]
    assert 0 < below[0] < below[1]
