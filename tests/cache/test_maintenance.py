from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from sdxl_lora_core.cache import maintenance
from sdxl_lora_core.cache.image_cache import ImageCache
from sdxl_lora_core.cache.image_entries import entry_folder
from sdxl_lora_core.generation.image_keys import key_of

PIXELS = np.zeros((8, 8, 3), np.uint8)
KEYS = [key_of({"number": number}) for number in range(10)]


@pytest.fixture
def cache(tmp_path: Path) -> ImageCache:
    return ImageCache(tmp_path / "images")


@pytest.fixture
def filled(cache: ImageCache) -> ImageCache:
    """Ten images of one size, the first one used an hour ago, each further one a minute later."""
    for number, key in enumerate(KEYS):
        cache.store(key, PIXELS, {})
        used_at(cache, key, time.time() - 3600 + 60 * number)
    return cache


def used_at(cache: ImageCache, key: str, when: float) -> None:
    os.utime(entry_folder(cache.root, key) / "manifest.json", (when, when))


def here(cache: ImageCache) -> list[int]:
    """The numbers of the images that are in the cache, without using them."""
    return [number for number, key in enumerate(KEYS) if (entry_folder(cache.root, key) / "manifest.json").exists()]


def size_of(cache: ImageCache) -> int:
    return sum(file.stat().st_size for file in cache.root.glob("v1/*/*/*"))


def limit_to(cache: ImageCache, images: float) -> None:
    """As many images of `filled` as that."""
    maintenance.set_limit(cache.root, images * size_of(cache) / len(here(cache)) / maintenance.GB)


# The limit


def test_ten_gigabytes_unless_the_folder_says_otherwise(cache: ImageCache) -> None:
    assert maintenance.limit(cache.root) == 10 * 10**9
    maintenance.set_limit(cache.root, 2.5)
    assert maintenance.limit(cache.root) == 2_500_000_000
    (cache.root / "limit_gb.txt").write_text("lots")
    assert maintenance.limit(cache.root) == 10 * 10**9


@pytest.mark.parametrize("gigabytes", [0, -1, float("nan"), float("inf")])
def test_a_limit_is_a_size(cache: ImageCache, gigabytes: float) -> None:
    with pytest.raises(ValueError, match="limit_gb is .*: set it to a size above 0"):
        maintenance.set_limit(cache.root, gigabytes)


def test_what_was_not_used_for_longest_goes_first(filled: ImageCache) -> None:
    limit_to(filled, 10.5)
    assert filled.load(KEYS[0]) is not None  # now it was used last
    filled.store(key_of({"number": 10}), PIXELS, {})
    assert here(filled) == [0, 3, 4, 5, 6, 7, 8, 9]  # and number 10: 90 % of the limit
    assert size_of(filled) <= 0.9 * maintenance.limit(filled.root)


def test_below_the_limit_nothing_is_looked_through(filled: ImageCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance, "entries", lambda root: pytest.fail("looked through the cache"))
    filled.store(KEYS[3], PIXELS, {})
    assert int((filled.root / "size.txt").read_text()) == size_of(filled) * 11 // 10  # it errs upwards


@pytest.mark.parametrize("text", [None, "", "12x"])
def test_a_lost_count_is_counted_anew(filled: ImageCache, text: str | None) -> None:
    note = filled.root / "size.txt"
    note.write_text(text) if text is not None else note.unlink()
    limit_to(filled, 9.5)
    filled.store(KEYS[9], PIXELS, {})
    assert here(filled) == [2, 3, 4, 5, 6, 7, 8, 9]
    assert int(note.read_text()) == size_of(filled)


def test_an_image_that_somebody_makes_is_not_dropped(filled: ImageCache) -> None:
    limit_to(filled, 2.5)
    with ImageCache(filled.root).locked([KEYS[0]]):
        maintenance.prune(filled.root)
    assert here(filled) == [0, 8, 9]


def test_the_image_just_made_stays_however_small_the_limit(cache: ImageCache) -> None:
    maintenance.set_limit(cache.root, 1e-9)
    for key in KEYS[:3]:
        with cache.locked([key]):
            cache.store(key, PIXELS, {})
    assert here(cache) == [2]


def test_foreign_folders_in_an_entry_do_not_keep_it(filled: ImageCache) -> None:
    thumbnails = entry_folder(filled.root, KEYS[0]) / "@eaDir"
    limit_to(filled, 8.5)
    thumbnails.mkdir()
    (thumbnails / "SYNO.png").write_bytes(b"x" * 100)
    freed = maintenance.prune(filled.root)
    assert not entry_folder(filled.root, KEYS[0]).exists() and here(filled) == list(range(2, 10))
    assert freed.images == 2 and freed.left == size_of(filled)


def test_what_another_program_holds_open_is_not_counted_as_removed(
    filled: ImageCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = entry_folder(filled.root, KEYS[0])
    remove = shutil.rmtree

    def on_windows(folder: Path) -> None:
        if folder == busy:
            raise PermissionError(13, "in use", str(folder / "image.png"))
        remove(folder)

    monkeypatch.setattr(shutil, "rmtree", on_windows)
    limit_to(filled, 8.5)
    freed = maintenance.prune(filled.root)
    assert freed.images == 1 and busy.exists() and freed.left == size_of(filled)
    assert maintenance._read_size(filled.root) == size_of(filled)
    monkeypatch.undo()
    assert maintenance.prune(filled.root).left == size_of(filled) and not busy.exists()


def test_limit_holds_among_threads(filled: ImageCache) -> None:
    limit_to(filled, 5)
    allowed = maintenance.limit(filled.root)
    largest = []

    def work(number: int) -> None:
        own = ImageCache(filled.root)
        for image in range(20):
            own.store(key_of({"thread": number, "image": image}), PIXELS, {})
            largest.append(size_of(own))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    one = size_of(filled) / sum(1 for _ in filled.root.glob("v1/*/*/manifest.json"))
    assert max(largest[3:]) <= allowed + 3 * one  # what the three have written and not counted yet


def test_a_cache_that_cannot_be_counted_costs_one_warning(filled: ImageCache, caplog: pytest.LogCaptureFixture) -> None:
    (filled.root / "size.txt").unlink()
    (filled.root / "size.txt").mkdir()
    for key in KEYS[:2]:
        filled.store(key, PIXELS, {})
    assert len(caplog.records) == 1 and "may exceed its limit" in caplog.text
    assert filled.load(KEYS[0]) is not None


# Looking, pruning, clearing, verifying


def test_stats(filled: ImageCache, tmp_path: Path) -> None:
    found = maintenance.stats(filled.root)
    assert (found.images, found.size, found.limit) == (10, size_of(filled), 10 * 10**9)
    assert found.oldest is not None and found.newest is not None
    assert found.newest - found.oldest == pytest.approx(540, abs=1)
    assert maintenance.stats(tmp_path / "nowhere") == maintenance.Stats(0, 0, 10 * 10**9, None, None)


def test_prune_drops_what_the_limit_does_not_hold_and_what_killed_processes_left(filled: ImageCache) -> None:
    half = entry_folder(filled.root, key_of({"killed": 1}))
    half.mkdir(parents=True)
    (half / ".image.png.01.tmp").write_bytes(b"half")
    half.with_suffix(".lock").touch()
    before = size_of(filled)
    limit_to(filled, 8.2)
    freed = maintenance.prune(filled.root)
    assert here(filled) == [2, 3, 4, 5, 6, 7, 8, 9] and not half.exists()
    assert not list(filled.root.rglob("*.lock"))
    assert (freed.images, freed.size, freed.left) == (2, before - size_of(filled), size_of(filled))


def test_clear_leaves_nothing_but_the_limit(filled: ImageCache, tmp_path: Path) -> None:
    maintenance.set_limit(filled.root, 3)
    assert maintenance.clear(filled.root).images == 10
    assert here(filled) == [] and size_of(filled) == 0
    assert maintenance.limit(filled.root) == 3 * 10**9
    filled.store(KEYS[0], PIXELS, {})
    assert filled.load(KEYS[0]) is not None
    assert maintenance.clear(tmp_path / "nowhere") == maintenance.Freed(0, 0, 0)
    assert not (tmp_path / "nowhere").exists()


def test_links_and_foreign_files_are_left_alone(filled: ImageCache, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "photo.png").write_bytes(b"mine")
    (filled.root / "v1" / "ab").mkdir(exist_ok=True)
    (filled.root / "v1" / "ab" / ("ab" * 32)).symlink_to(elsewhere)
    (filled.root / "v1" / "notes").mkdir()
    (filled.root / "v1" / "notes" / "mine.txt").touch()
    maintenance.clear(filled.root)
    assert (elsewhere / "photo.png").exists() and (filled.root / "v1" / "notes" / "mine.txt").exists()


def test_verify_names_the_damaged_and_removes_them_when_told(filled: ImageCache) -> None:
    image = entry_folder(filled.root, KEYS[4]) / "image.png"
    image.write_bytes(image.read_bytes()[:-1])
    seen = []
    assert maintenance.verify(filled.root, on_image=lambda done, total: seen.append((done, total))) == [KEYS[4]]
    assert seen == [(number, 10) for number in range(1, 11)]
    assert maintenance.verify(filled.root, remove=True) == [KEYS[4]]
    assert here(filled) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert maintenance.verify(filled.root) == []
