"""The image cache among several processes, killed ones among them, and on disks that do not behave."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sdxl_lora_core.cache import maintenance
from sdxl_lora_core.cache.image_cache import ImageCache
from sdxl_lora_core.cache.image_entries import entry_folder
from sdxl_lora_core.generation.image_keys import key_of
from sdxl_lora_core.sdxl.base import SDXLBase
from tests.micro.images import draw, hits, settings

REPOSITORY = Path(__file__).parents[2]
KEY = key_of({"prompt": "a red circle"})


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def noise(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)


# Several servers

SERVER = """
import json, os, random, sys, time
from pathlib import Path
import numpy as np
import torch
from sdxl_lora_core.generation import generate as generation
from sdxl_lora_core.sdxl.base import open_base
from sdxl_lora_core.generation.config import GenerateConfig
from sdxl_lora_core.cache.folders import CacheFolders
from sdxl_lora_core.generation.image_maker import MadeImage
from sdxl_lora_core.generation.job import GenerationContext, GenerationJob
from sdxl_lora_core.generation.prompt_encoder import EncodedPrompts
from sdxl_lora_core.runtime.loaded_parts import LoadedParts

folder, home, number, requests, images = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])
log = os.open(home / "made", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

class Maker:
    def __init__(self, *_): pass
    def make(self, batch, on_step):
        seeds = batch.seeds
        os.write(log, f"{seeds[0]}\\n".encode())
        time.sleep(0.02)
        drawn = [np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8) for seed in seeds]
        return [MadeImage(pixels, torch.zeros(4, 8, 8), ()) for pixels in drawn]

class Texts:
    def __init__(self, *_): pass
    def encode(self, texts): return EncodedPrompts(dict.fromkeys(texts), ())

generation.ImageMaker, generation.TextPhase = Maker, Texts  # drawing itself is not what is tested
base, parts = open_base(folder, "fp32", home / "hashes"), LoadedParts(torch.device("cpu"))
order = random.Random(number)
(home / f"ready-{number}").touch()
while len(list(home.glob("ready-*"))) < 4:
    time.sleep(0.01)
found = 0
for _ in range(requests):
    config = GenerateConfig(prompt="x", width=64, height=64, steps=1, seed=order.randrange(images))
    [image] = generation.generate(GenerationJob(base, config), GenerationContext(parts, CacheFolders(home)))
    found += image.hit
    wanted = np.random.default_rng(image.seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert np.array_equal(image.pixels, wanted), image.seed
print(found)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("requests", "images"), [(160, 20), pytest.param(1000, 60, marks=pytest.mark.accept)])
def test_four_servers_make_each_image_once(micro_sdxl: Path, tmp_path: Path, requests: int, images: int) -> None:
    servers = [start(SERVER, micro_sdxl, tmp_path, number, requests // 4, images) for number in range(4)]
    answers = [server.communicate() for server in servers]
    assert [server.returncode for server in servers] == [0] * 4, answers
    made = (tmp_path / "made").read_text().split()
    assert sorted(map(int, made)) == list(range(images)), "no image was made twice"
    assert sum(int(out) for out, _ in answers) == requests - images
    assert "".join(err for _, err in answers) == "", "nobody had to be warned"
    found = maintenance.stats(tmp_path / "images")
    assert found.images == images and maintenance.verify(tmp_path / "images") == []
    total = int((tmp_path / "images/size.txt").read_text())  # servers that begin together may count an image twice
    assert found.size <= total <= found.size + 4 * max(file.stat().st_size for file in tmp_path.rglob("image.png")) * 2
    assert {file.name for file in (tmp_path / "images").rglob("*") if file.is_file()} == {
        "image.png",
        "manifest.json",
        "size.txt",
    }


# Killed while writing

WRITE_AND_DIE = """
import os, signal, sys
from pathlib import Path
import numpy as np
from sdxl_lora_core.cache.image_cache import ImageCache

root, key, file, moment = Path(sys.argv[1]), *sys.argv[2:]
replace, write_bytes = os.replace, Path.write_bytes

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def replacing(source, target):
    if Path(target).name == file and moment == "before": die()
    replace(source, target)
    if Path(target).name == file and moment == "after": die()

def writing(path, data):
    if moment == "half":
        write_bytes(path, data[: len(data) // 2])
        die()
    return write_bytes(path, data)

os.replace, Path.write_bytes = replacing, writing
cache = ImageCache(root)
with cache.locked([key]):
    cache.store(key, np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8), {})
"""
MOMENTS = [
    ("image.png", "half"),
    ("image.png", "before"),
    ("image.png", "after"),
    ("manifest.json", "before"),
    ("manifest.json", "after"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "moment"), MOMENTS)
@pytest.mark.parametrize("was_there", [False, True])
def test_killed_while_writing(tmp_path: Path, file: str, moment: str, was_there: bool) -> None:
    cache = ImageCache(tmp_path)
    if was_there:
        cache.store(KEY, noise(0), {})
    writer = start(WRITE_AND_DIE, tmp_path, KEY, file, moment)
    writer.communicate()
    assert writer.returncode == -signal.SIGKILL
    found = cache.load(KEY)  # the old image, the new one or none, but nothing else
    assert found is None or any(np.array_equal(found, noise(seed)) for seed in (0, 1))
    if (file, moment) == ("manifest.json", "after"):
        np.testing.assert_array_equal(found, noise(1))
    elif not was_there:
        assert found is None
    with cache.locked([KEY], lambda: pytest.fail("the dead process still holds it")):
        cache.store(KEY, noise(1), {})
    np.testing.assert_array_equal(ImageCache(tmp_path).load(KEY), noise(1))
    maintenance.prune(tmp_path)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"image.png", "manifest.json", "size.txt"}


# Disks

FULL = """
import logging, resource, sys
from pathlib import Path
import numpy as np
from sdxl_lora_core.cache.image_cache import ImageCache

logging.basicConfig(format="%(message)s")
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # no file gets longer
cache = ImageCache(Path(sys.argv[1]))
pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
for key in sys.argv[2:]:
    with cache.locked([key]):
        assert np.array_equal(cache.store(key, pixels, {}), pixels)
    assert cache.load(key) is None
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
def test_a_disk_that_takes_no_more_costs_one_warning(tmp_path: Path) -> None:
    writer = start(FULL, tmp_path, KEY, key_of({"another": 1}))
    _, said = writer.communicate()
    assert writer.returncode == 0, said
    assert said.count("images are not cached") == 1 and len(said.splitlines()) == 1, said
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_read_only_disk_gives_what_it_has(
    micro_base: SDXLBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = draw(micro_base, settings(), cache_folder=tmp_path)
    read_only = OSError(errno.EROFS, os.strerror(errno.EROFS))
    opened = os.open

    def opening(path: str | Path, flags: int, *rest: int, **more: int) -> int:
        if str(path).startswith(str(tmp_path)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise read_only
        return opened(path, flags, *rest, **more)

    def refuse(*_: object, **__: object) -> None:
        raise read_only

    monkeypatch.setattr("os.open", opening)
    for name in ("os.utime", "os.replace", "os.mkdir", "pathlib.Path.write_bytes", "pathlib.Path.write_text"):
        monkeypatch.setattr(name, refuse)
    images = draw(micro_base, settings(count=3), cache_folder=tmp_path)
    assert hits(images) == [True, False, False]
    np.testing.assert_array_equal(images[0].pixels, made[0].pixels)
    messages = [record.message for record in caplog.records if record.name == "sdxl_lora"]
    assert len(messages) == 1 and "Read-only file system" in messages[0]


def test_a_folder_that_vanishes_is_made_again(
    micro_base: SDXLBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def vanish(done: int, total: int) -> None:
        shutil.rmtree(tmp_path / "images", ignore_errors=True)

    images = draw(micro_base, settings(count=2), cache_folder=tmp_path / "images", on_step=vanish)
    assert hits(images) == [False, False]
    assert hits(draw(micro_base, settings(seed=6), cache_folder=tmp_path / "images")) == [True], "the second one"
    assert not [record for record in caplog.records if record.name == "sdxl_lora"]


@pytest.mark.parametrize("damage", ["flipped bit", "truncated manifest", "manifest of another schema"])
def test_a_damaged_image_is_delivered_and_heals(
    micro_base: SDXLBase, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    made = draw(micro_base, settings(), cache_folder=tmp_path)[0]
    folder = entry_folder(tmp_path, made.key)
    image, manifest = folder / "image.png", folder / "manifest.json"
    if damage == "flipped bit":
        data = bytearray(image.read_bytes())
        data[len(data) // 2] ^= 4
        image.write_bytes(data)
    elif damage == "truncated manifest":
        manifest.write_bytes(manifest.read_bytes()[:-40])
    else:
        manifest.write_text(json.dumps({"schema": 99}))
    again = draw(micro_base, settings(), cache_folder=tmp_path)
    assert hits(again) == [False] and np.array_equal(again[0].pixels, made.pixels)
    assert len([record for record in caplog.records if record.name == "sdxl_lora"]) == 1
    assert hits(draw(micro_base, settings(), cache_folder=tmp_path)) == [True]
