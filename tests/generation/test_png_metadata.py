from __future__ import annotations

import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_lora_core.generation.config import GenerateConfig
from sdxl_lora_core.generation.png_metadata import PngTexts, graph_texts, without_paths
from sdxl_lora_core.images.png import AI_GENERATED
from sdxl_lora_core.lora.stack import LoRARef, StackEntry
from sdxl_lora_core.sdxl.base import SDXLBase
from tests.micro.images import draw, hits, settings, write_lora

STACK = (
    StackEntry(LoRARef(Path("a"), "styles/ink, wet.safetensors", 0.8, 0.8), "a1" * 32),
    StackEntry(LoRARef(Path("b"), "sub\\line.safetensors", 1.0, 0.5), "b2" * 32),
)
CONFIG = GenerateConfig(prompt="a red circle", negative_prompt="blurry", steps=30, width=832, height=1216)
GRAPH = {"prompt": {"3": {"inputs": {"image": "/home/me/photos/cat.png"}}}, "workflow": {"nodes": []}}

# As readers of A1111's text find their way in it
HASHES = re.compile(r", Hashes:\s*({[^}]+})")
LORAS = re.compile(r"<lora:([^:>]+):([^>]+)>")


def single(base: SDXLBase) -> SDXLBase:
    hashes = tuple((part, "c3" * 32) for part, _ in base.part_hashes)
    return dataclasses.replace(base, layout="single_file", name="my: base", part_hashes=hashes)


def test_parameters_as_a1111_writes_them(micro_base: SDXLBase) -> None:
    text = PngTexts(single(micro_base), CONFIG, STACK).parameters("a red circle", 7)
    prompt, negative, facts = text.split("\n")
    assert prompt == "a red circle <lora:ink, wet:0.8> <lora:line:0.5:1>"  # text encoders first, as A1111 reads it
    assert negative == "Negative prompt: blurry"
    assert facts == (
        "Steps: 30, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 7, Size: 832x1216, "
        'Model hash: c3c3c3c3c3, Model: "my: base", '
        'Hashes: {"model": "c3c3c3c3c3", "lora:ink, wet": "a1a1a1a1a1", "lora:line": "b2b2b2b2b2"}'
    )
    hashes = HASHES.search(text)
    assert hashes and json.loads(hashes[1])["lora:line"] == "b2b2b2b2b2"
    assert LORAS.findall(text) == [("ink, wet", "0.8"), ("line", "0.5:1")]


def test_a_folder_has_no_hash_that_others_know(micro_base: SDXLBase) -> None:
    text = PngTexts(micro_base, dataclasses.replace(CONFIG, negative_prompt="")).parameters("a red circle", 7)
    assert text.startswith("a red circle\nSteps: 30, ")
    assert text.endswith(f"Size: 832x1216, Model: {micro_base.name}")


def test_the_mark_is_iptcs_as_xmp() -> None:
    text = AI_GENERATED.split("?>", 1)[1].rsplit("<?", 1)[0]
    found = ElementTree.fromstring(text).iter("{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType")
    assert [mark.text for mark in found] == ["http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/home/me/loras/ink.safetensors", "ink.safetensors"),
        ("C:\\Users\\Me Myself\\ink.safetensors", "ink.safetensors"),
        ("c:/users/me", "me"),
        ("\\\\server\\share\\ink.png", "ink.png"),
        ("~/pictures/cat.png", "cat.png"),
        ("file:///home/me/cat.png", "cat.png"),
        ('"/home/me/My Pictures/cat.png"', "cat.png"),
        ("/mnt/data/", "data"),
        ("first line\n/home/me/cat.png\nlast", "first line\ncat.png\nlast"),
        ("ffmpeg -i /home/me/in.mp4 --out=C:\\tmp\\x.mp4", "ffmpeg -i in.mp4 --out=x.mp4"),
    ],
)
def test_local_paths_keep_their_last_name_only(text: str, kept: str) -> None:
    assert without_paths({"a": [text]}) == {"a": [kept]}


@pytest.mark.parametrize(
    "value",
    [
        "styles/ink.safetensors",
        "sub\\ink.safetensors",
        "a cat and/or a dog, 1/2, w/ hat",
        "https://example.org/a/b.png",
        "a / b",
        "key: /",
        "data:image/jpeg;base64,/9j/" + "4AAQ/SkZ/" * 800,
        "",
        5,
        0.5,
        True,
        None,
    ],
)
def test_everything_else_stays(value: Any) -> None:
    assert without_paths(value) == value


def test_a_text_that_readers_refuse_is_left_out() -> None:
    texts = graph_texts({"prompt": GRAPH["prompt"], "workflow": {"data": "x " * 600_000}, "missing": None})
    assert list(texts) == ["prompt"]


# In the cache


def test_the_cached_png_says_how_it_was_made_first(micro_base: SDXLBase, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "größe.safetensors", micro_base, seed=1)
    made = draw(micro_base, settings(), [lora], cache_folder=tmp_path / "images", graph=GRAPH)[0]
    file = next(tmp_path.rglob("image.png"))
    with Image.open(file) as image:
        texts = dict(image.info)
        assert np.array_equal(np.asarray(image), made.pixels)
    assert json.loads(texts["prompt"]) == {"3": {"inputs": {"image": "cat.png"}}}
    assert json.loads(texts["workflow"]) == {"nodes": []}
    assert "<lora:größe:1>" in texts["parameters"] and "Seed: 5," in texts["parameters"]
    assert "trainedAlgorithmicMedia" in texts["XML:com.adobe.xmp"]
    for secret in (tmp_path, micro_base.path, Path("/home/me")):
        assert str(secret).encode() not in file.read_bytes()

    before = file.read_bytes()
    again = draw(micro_base, settings(), [lora], cache_folder=tmp_path / "images", graph={"workflow": {"other": 1}})
    assert hits(again) == [True] and np.array_equal(again[0].pixels, made.pixels)
    assert file.read_bytes() == before
    assert json.loads(again[0].texts["workflow"]) == {"other": 1}, "what is handed on is about this request"


def test_without_a_graph_only_the_mark(micro_base: SDXLBase, tmp_path: Path) -> None:
    image = draw(micro_base, settings(), cache_folder=tmp_path)[0]
    assert list(image.texts) == ["XML:com.adobe.xmp"]
    with Image.open(next(tmp_path.rglob("image.png"))) as stored:
        assert set(stored.info) & {"prompt", "workflow", "parameters"} == set()
        assert "trainedAlgorithmicMedia" in stored.info["XML:com.adobe.xmp"]


def test_the_graph_is_not_in_the_key(micro_base: SDXLBase, tmp_path: Path) -> None:
    keys = {
        draw(micro_base, settings(cache="use"), cache_folder=tmp_path, graph=graph)[0].key for graph in (None, GRAPH)
    }
    assert len(keys) == 1
