from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl_lora_core.cache import image_cache
from sdxl_lora_core.cache.image_cache import ImageCache
from sdxl_lora_core.generation.image_keys import key_of

REPOSITORY = Path(__file__).parents[2]
KEY = key_of({"prompt": "a red circle"})
OTHER = key_of({"prompt": "a blue circle"})


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)


@pytest.fixture
def cache(tmp_path: Path) -> ImageCache:
    return ImageCache(tmp_path / "images")


def entry(cache: ImageCache, key: str = KEY) -> Path:
    return cache.root / "v1" / key[:2] / key


def run_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


# Storing and reading


def test_unknown_key_is_a_silent_miss(cache: ImageCache, caplog: pytest.LogCaptureFixture) -> None:
    assert cache.load(KEY) is None
    assert not caplog.records


def test_hit_is_what_the_miss_returned(cache: ImageCache, pixels: np.ndarray) -> None:
    returned = cache.store(KEY, pixels, {})
    found = ImageCache(cache.root).load(KEY)
    assert found is not None and found.dtype == np.uint8
    assert found.tobytes() == returned.tobytes() == pixels.tobytes()
    found[0] = 0  # a caller may write into its own copy
    assert cache.load(KEY)[0].any()


def test_entry_is_a_png_and_a_manifest(cache: ImageCache, pixels: np.ndarray) -> None:
    cache.store(KEY, pixels, {"settings": {"prompt": "größer"}})
    assert {file.name for file in entry(cache).iterdir()} == {"image.png", "manifest.json"}
    with Image.open(entry(cache) / "image.png") as image:
        assert (image.format, image.mode, image.size, image.info) == ("PNG", "RGB", (40, 24), {})
    manifest = json.loads((entry(cache) / "manifest.json").read_text(encoding="utf-8"))
    png = (entry(cache) / "image.png").read_bytes()
    assert manifest == {
        "schema": 1,
        "key": KEY,
        "size": len(png),
        "sha256": hashlib.sha256(png).hexdigest(),
        "settings": {"prompt": "größer"},
    }
    assert str(cache.root).encode() not in png + json.dumps(manifest).encode()


def test_manifest_is_written_last(cache: ImageCache, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    replace = os.replace
    monkeypatch.setattr("os.replace", lambda src, dst: (order.append(Path(dst).name), replace(src, dst)))
    cache.store(KEY, pixels, {})
    assert order == ["image.png", "manifest.json"]


def test_key_depends_on_values_and_not_on_their_order() -> None:
    assert key_of({"a": 1, "b": [2, "x"]}) == key_of({"b": [2, "x"], "a": 1})
    assert key_of({"a": 1, "b": [2, "x"]}) != key_of({"a": 1, "b": ["x", 2]})


# Damage


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def flip_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def become_a_list(file: Path) -> None:
    file.write_text("[]")


def lose_the_checksum(file: Path) -> None:
    file.write_text(json.dumps({"key": KEY}))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("image.png", truncate),
        ("image.png", flip_bit),
        ("image.png", empty),
        ("manifest.json", truncate),
        ("manifest.json", empty),
        ("manifest.json", become_a_list),
        ("manifest.json", lose_the_checksum),
    ],
)
def test_damaged_entry_is_a_miss_with_one_warning_and_heals(
    cache: ImageCache, pixels: np.ndarray, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], None]
) -> None:
    cache.store(KEY, pixels, {})
    damage(entry(cache) / name)
    assert cache.load(KEY) is None
    assert cache.load(KEY) is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert KEY[:12] in caplog.text
    cache.store(KEY, pixels, {})
    np.testing.assert_array_equal(cache.load(KEY), pixels)


def test_entry_under_a_wrong_key_is_a_miss(cache: ImageCache, pixels: np.ndarray) -> None:
    cache.store(KEY, pixels, {})
    entry(cache, OTHER).parent.mkdir(parents=True, exist_ok=True)
    entry(cache).rename(entry(cache, OTHER))
    assert cache.load(OTHER) is None


@pytest.mark.parametrize("name", ["image.png", "manifest.json"])
def test_missing_file_is_a_miss_and_heals(cache: ImageCache, pixels: np.ndarray, name: str) -> None:
    cache.store(KEY, pixels, {})
    (entry(cache) / name).unlink()
    assert cache.load(KEY) is None
    cache.store(KEY, pixels, {})
    np.testing.assert_array_equal(cache.load(KEY), pixels)


def test_litter_of_a_killed_writer_is_swept(cache: ImageCache, pixels: np.ndarray) -> None:
    entry(cache).mkdir(parents=True)
    litter = entry(cache) / ".image.png.0123.tmp"
    litter.write_bytes(b"half")
    assert cache.load(KEY) is None
    cache.store(KEY, pixels, {})
    assert not litter.exists()


# Disks that do not take it


def test_full_disk_costs_one_warning_and_keeps_what_was_there(
    cache: ImageCache, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache.store(KEY, pixels, {})
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        for key in (KEY, OTHER):
            np.testing.assert_array_equal(cache.store(key, pixels, {}), pixels)
    assert len(caplog.records) == 1 and "No space left" in caplog.text
    np.testing.assert_array_equal(cache.load(KEY), pixels)
    assert cache.load(OTHER) is None
    assert not list(cache.root.rglob("*.tmp"))


def test_unwritable_folder_costs_one_warning(
    tmp_path: Path, pixels: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder can be made in here")  # works for root, too, unlike chmod
    cache = ImageCache(tmp_path / "file" / "images")
    entered = False
    with cache.locked([KEY]):
        entered = True
        np.testing.assert_array_equal(cache.store(KEY, pixels, {}), pixels)
    assert entered
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


# Locks

MAKE_ONCE = """
import sys, time
from pathlib import Path
import numpy as np
from sdxl_lora_core.cache.image_cache import ImageCache
cache, log, key = ImageCache(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3]
with cache.locked([key]):
    if cache.load(key) is None:
        with log.open("a") as lines:
            lines.write("made\\n")
        time.sleep(0.5)
        cache.store(key, np.zeros((8, 8, 3), np.uint8), {})
sys.exit(cache.load(key) is None)
"""

HOLD = """
import sys, time
from pathlib import Path
from sdxl_lora_core.cache.image_cache import ImageCache
with ImageCache(Path(sys.argv[1])).locked([sys.argv[2]]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_three_processes_make_one_image(cache: ImageCache, tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = [run_python(MAKE_ONCE, cache.root, log, KEY) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert log.read_text() == "made\n"


@pytest.mark.slow
def test_lock_of_a_killed_process_is_free(cache: ImageCache) -> None:
    holder = run_python(HOLD, cache.root, KEY)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    waited = []

    def waiting() -> None:
        waited.append(1)
        holder.kill()
        holder.wait(10)

    with cache.locked([KEY], waiting):
        assert waited


def test_waiting_may_give_up(cache: ImageCache) -> None:
    class Cancelled(Exception):
        pass

    def cancel() -> None:
        raise Cancelled

    first, second = sorted([KEY, OTHER])
    holder = ImageCache(cache.root)
    with holder.locked([second]):
        with pytest.raises(Cancelled), cache.locked([first, second], cancel):
            pytest.fail("entered a block that another one holds")
        with holder.locked([first], cancel):  # it was let go of
            pass


def test_lock_held_too_long_is_passed(
    cache: ImageCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(image_cache, "LOCK_SECONDS", 0.3)
    waits: list[None] = []
    with ImageCache(cache.root).locked([KEY]), cache.locked([KEY], lambda: waits.append(None)):
        assert waits and len(caplog.records) == 1


def test_threads_that_want_the_same_images_in_another_order_do_not_block(cache: ImageCache) -> None:
    def work(keys: list[str]) -> None:
        for _ in range(5):
            with ImageCache(cache.root).locked(keys):
                time.sleep(0.002)

    threads = [threading.Thread(target=work, args=(keys,)) for keys in ([KEY, OTHER], [OTHER, KEY])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)


def test_locks_leave_no_files(cache: ImageCache, pixels: np.ndarray) -> None:
    with cache.locked([KEY, OTHER]):
        cache.store(KEY, pixels, {})
    assert {file.name for file in cache.root.rglob("*") if file.is_file()} == {"image.png", "manifest.json", "size.txt"}
