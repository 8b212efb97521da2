from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sdxl_lora_core.generation.passes import GeneratedImage
from sdxl_lora_core.lora.stack import LoRARef
from sdxl_lora_core.runtime.loaded_parts import LoadedParts
from sdxl_lora_core.sdxl.base import SDXLBase
from tests.micro.images import CPU, WatchedParts, draw, hits, pixels, settings, write_lora

REPOSITORY = Path(__file__).parents[2]


class Cancelled(Exception):
    pass


@pytest.fixture
def images_folder(tmp_path: Path) -> Path:
    return tmp_path / "images"


@pytest.fixture(scope="session")
def lora(micro_base: SDXLBase, tmp_path_factory: pytest.TempPathFactory) -> LoRARef:
    return write_lora(tmp_path_factory.mktemp("loras") / "style.safetensors", micro_base, seed=1)


# Cache, progress, cancelling


def test_count_4_finds_what_count_1_made(micro_base: SDXLBase, images_folder: Path) -> None:
    steps = []
    made = draw(micro_base, settings(seed=6), cache_folder=images_folder)
    images = draw(
        micro_base,
        settings(count=4),
        cache_folder=images_folder,
        on_step=lambda done, total: steps.append((done, total)),
    )
    assert hits(images) == [False, True, False, False]
    assert images[1].key == made[0].key
    np.testing.assert_array_equal(images[1].pixels, made[0].pixels)
    assert steps == [(done, 9) for done in range(10)]
    again = draw(micro_base, settings(count=4), cache_folder=images_folder, on_step=pytest.fail)
    assert hits(again) == [True] * 4
    assert all(np.array_equal(one.pixels, other.pixels) for one, other in zip(images, again, strict=True))


def test_renamed_lora_is_the_same_lora(
    micro_base: SDXLBase, images_folder: Path, lora: LoRARef, tmp_path: Path
) -> None:
    draw(micro_base, settings(), [lora], cache_folder=images_folder)
    copy = LoRARef(tmp_path / "renamed.safetensors", "renamed", lora.strength_model, lora.strength_clip)
    shutil.copy(lora.path, copy.path)
    memo = tmp_path / "hashes"
    assert hits(draw(micro_base, settings(), [copy], cache_folder=images_folder, hash_memo=memo)) == [True]
    write_lora(copy.path, micro_base, seed=9)  # retrained under the same name
    assert hits(draw(micro_base, settings(), [copy], cache_folder=images_folder, hash_memo=memo)) == [False]


def test_refresh_makes_and_replaces(micro_base: SDXLBase, images_folder: Path) -> None:
    draw(micro_base, settings(), cache_folder=images_folder)
    png = next(images_folder.rglob("image.png"))
    good = png.read_bytes()
    png.write_bytes(b"damaged")
    assert hits(draw(micro_base, settings(cache="refresh"), cache_folder=images_folder)) == [False]
    assert png.read_bytes() == good
    assert hits(draw(micro_base, settings(cache="refresh"), cache_folder=images_folder)) == [False]


def test_off_neither_reads_nor_writes(micro_base: SDXLBase, images_folder: Path) -> None:
    for _ in range(2):
        assert hits(draw(micro_base, settings(cache="off"), cache_folder=images_folder)) == [False]
    assert not images_folder.exists()


def test_only_takes_what_is_there_and_names_what_is_not(micro_base: SDXLBase, images_folder: Path) -> None:
    made = draw(micro_base, settings(seed=6), cache_folder=images_folder)
    parts = WatchedParts()
    found = draw(micro_base, settings(seed=6, cache="only"), parts=parts, cache_folder=images_folder)
    assert hits(found) == [True] and np.array_equal(found[0].pixels, made[0].pixels)
    message = "3 of 4 images are not in the cache: 'a red circle' with seed 5; .*seed 7; .*seed 8; set cache to 'use'"
    with pytest.raises(ValueError, match=message):
        draw(micro_base, settings(count=4, cache="only"), parts=parts, cache_folder=images_folder)
    with pytest.raises(ValueError, match="'only' and 5 of 5 .*seed 7 and 2 more;"):
        draw(micro_base, settings(count=5, cache="only"), parts=parts, cache_folder=None)
    assert parts.taken_events() == []


def test_damaged_entry_heals(micro_base: SDXLBase, images_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = draw(micro_base, settings(), cache_folder=images_folder)
    png = next(images_folder.rglob("image.png"))
    png.write_bytes(png.read_bytes()[:-100])
    healed = draw(micro_base, settings(), cache_folder=images_folder)
    np.testing.assert_array_equal(healed[0].pixels, made[0].pixels)
    assert [record.levelno for record in caplog.records if record.name == "sdxl_lora"] == [logging.WARNING]
    assert hits(draw(micro_base, settings(), cache_folder=images_folder)) == [True]


def test_cache_that_cannot_be_written_costs_one_warning(
    micro_base: SDXLBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    images = draw(micro_base, settings(count=2), cache_folder=tmp_path / "file" / "images")
    assert hits(images) == [False, False]
    messages = [record.message for record in caplog.records if record.name == "sdxl_lora"]
    assert len([message for message in messages if "not cached" in message]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 1, 3, 4, 6, 7, 8])
def test_cancel_passes_through_and_loses_nothing(micro_base: SDXLBase, images_folder: Path, at: int) -> None:
    def cancel(done: int, total: int) -> None:
        if done == at:
            raise Cancelled

    with pytest.raises(Cancelled):
        draw(micro_base, settings(count=3), cache_folder=images_folder, on_step=cancel)
    finished = max(0, at - 1) // 3
    again = draw(micro_base, settings(count=3), cache_folder=images_folder)
    assert hits(again) == [number < finished for number in range(3)]
    np.testing.assert_array_equal(again[2].pixels, pixels(micro_base, settings(seed=7))[0])
    assert not list(images_folder.rglob("*.lock"))


def test_two_threads_make_one_image(micro_base: SDXLBase, images_folder: Path) -> None:
    made: list[int] = []
    images: list[GeneratedImage] = []

    def work() -> None:
        def count(done: int, total: int) -> None:
            made.append(done)

        images.extend(
            draw(micro_base, settings(steps=6), parts=LoadedParts(CPU), cache_folder=images_folder, on_step=count)
        )

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(hits(images)) == [False, True]
    assert made.count(1) == 1, "the one that waited has asked the UNet, too"
    assert made.count(6) == 2


def test_cache_holds_no_path(micro_base: SDXLBase, images_folder: Path, lora: LoRARef) -> None:
    draw(micro_base, settings(), [lora], cache_folder=images_folder)
    files = [file for file in images_folder.rglob("*") if file.is_file()]
    stored = b"".join(file.read_bytes() for file in files)
    assert {file.name for file in files} == {"image.png", "manifest.json", "size.txt"}
    for secret in (micro_base.path, lora.path, images_folder, Path.home()):
        assert str(secret).encode() not in stored
    manifest = json.loads(next(images_folder.rglob("manifest.json")).read_text())
    assert (manifest["settings"]["prompt"], manifest["settings"]["seed"]) == ("a red circle", 5)


# Prompt embeddings on disk


@pytest.mark.slow
def test_known_prompts_need_no_text_encoders(micro_base: SDXLBase, tmp_path: Path, lora: LoRARef) -> None:
    first = pixels(micro_base, settings(), prompt_cache=tmp_path)
    parts = WatchedParts()
    np.testing.assert_array_equal(pixels(micro_base, settings(), parts=parts, prompt_cache=tmp_path), first)
    assert parts.taken_events("load") == ["load unet", "load vae"]
    pixels(micro_base, settings(), [lora], parts=parts, prompt_cache=tmp_path)  # it changes what a prompt means
    assert parts.taken_events("load") == ["load text_encoders"], "the held UNet takes the LoRA in place"


@pytest.mark.slow
def test_damaged_prompt_file_heals(micro_base: SDXLBase, tmp_path: Path) -> None:
    first = pixels(micro_base, settings(), prompt_cache=tmp_path)
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        file.write_bytes(file.read_bytes()[:-10])
    np.testing.assert_array_equal(pixels(micro_base, settings(), prompt_cache=tmp_path), first)
    parts = WatchedParts()
    pixels(micro_base, settings(), parts=parts, prompt_cache=tmp_path)
    assert parts.taken_events("load") == ["load unet", "load vae"]


# What is left behind


def test_global_randomness_is_left_alone(micro_base: SDXLBase) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = pixels(micro_base, settings())
    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)
    torch.rand(7)
    np.testing.assert_array_equal(pixels(micro_base, settings()), first)


def test_weights_loaded_in_inference_mode_can_be_trained(micro_base: SDXLBase, lora: LoRARef) -> None:
    parts = WatchedParts()
    with torch.inference_mode():
        pixels(micro_base, settings(), [lora], parts=parts)
        assert torch.is_inference_mode_enabled()
    for part in ("unet", "vae", "text_encoders"):
        assert not any(weight.is_inference() for weight in parts.held(part).parameters())


HIT = """
import sys
from pathlib import Path
import torch
from sdxl_lora_core.sdxl.base import open_base
from sdxl_lora_core.generation.config import GenerateConfig
from sdxl_lora_core.runtime.loaded_parts import LoadedParts
from sdxl_lora_core.lora.stack import LoRARef
from sdxl_lora_core.generation.generate import generate
from sdxl_lora_core.generation.job import GenerationContext, GenerationJob
from sdxl_lora_core.cache.folders import CacheFolders
folder, images, lora = map(Path, sys.argv[1:])
config = GenerateConfig(prompt="a red circle", width=64, height=64, steps=3, seed=5)
loras = [LoRARef(lora, "x", 1.0, 1.0)]
context = GenerationContext(LoadedParts(torch.device("cpu")), CacheFolders(images.parent))
found = generate(GenerationJob(open_base(folder, "fp32"), config, loras), context)
heavy = {"diffusers", "transformers", "peft", "accelerate", "pydantic", "matplotlib"} & set(sys.modules)
print(found[0].hit, sorted(heavy))
"""


@pytest.mark.slow
def test_a_hit_in_another_process_imports_nothing_heavy(
    micro_sdxl: Path, micro_base: SDXLBase, images_folder: Path, lora: LoRARef
) -> None:
    draw(micro_base, settings(), [lora], cache_folder=images_folder)
    command = [sys.executable, "-c", HIT, str(micro_sdxl), str(images_folder), str(lora.path)]
    answer = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert answer.stdout == "True []\n"


def test_the_image_and_its_step_are_told_in_words(micro_base: SDXLBase, tmp_path: Path) -> None:
    words: list[str] = []
    config = settings(count=3, batch_size=2, steps=2)
    draw(micro_base, replace(config, count=1, seed=config.seed + 2), cache_folder=tmp_path)
    draw(micro_base, replace(config, count=4), cache_folder=tmp_path, on_detail=words.append)
    assert words == [
        "images 1 to 2 of 3, step 1 of 2",
        "images 1 to 2 of 3, step 2 of 2",
        "image 3 of 3, step 1 of 2",
        "image 3 of 3, step 2 of 2",
    ]
