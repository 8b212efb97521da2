from __future__ import annotations

import errno
import hashlib
import os
import time
from pathlib import Path

import pytest

from sdxl_lora_core import files


@pytest.mark.parametrize(
    "bad", ["", "..", "../a", "a/../b", "/etc", "a//b", "C:/x", "a\\b", "con", "nul.txt", "a.", "b ", "a\0b"]
)
def test_paths_that_leave_or_confuse_are_refused(tmp_path: Path, bad: str) -> None:
    with pytest.raises(ValueError):
        files.safe_path(tmp_path, bad)


def test_a_link_that_points_outside_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="outside"):
        files.safe_path(root, "link/secret.txt")


def test_a_plain_name_is_found_inside(tmp_path: Path) -> None:
    assert (
        files.safe_path(tmp_path, "style/my lora.safetensors") == tmp_path.resolve() / "style" / "my lora.safetensors"
    )


def test_a_failed_write_keeps_the_old_file_and_leaves_no_litter(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    files.write_text_atomic(target, "old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"could not write file\.txt: No space left") as caught:
        files.write_atomic(target, fail)
    assert caught.value.errno == errno.ENOSPC
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_hashes_follow_content_not_names(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"same")
    assert files.file_sha256(tmp_path / "a") == files.file_sha256(tmp_path / "b")


def test_a_remembered_hash_is_not_read_again_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, memo = tmp_path / "weights", tmp_path / "memo"
    target.write_bytes(b"one")
    assert files.file_sha256(target, memo) and not memo.exists()  # too young: a change might not be seen
    time.sleep(0.06)
    first = files.file_sha256(target, memo)
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("read again"))
        assert files.file_sha256(target, memo) == first
    target.write_bytes(b"three")
    assert files.file_sha256(target, memo) != first
    time.sleep(0.06)
    assert files.file_sha256(target, memo) != first
    for note in memo.iterdir():
        note.write_text("")  # what a power cut leaves
    assert files.file_sha256(target, memo) == files.file_sha256(target)


def test_a_file_rewritten_in_place_with_the_same_size_and_time_is_hashed_again(tmp_path: Path) -> None:
    target, memo = tmp_path / "weights", tmp_path / "memo"
    target.write_bytes(b"one")
    time.sleep(0.06)
    before, first, seen = target.stat(), files.file_sha256(target, memo), files.stat_fingerprint(target)
    assert len(list(memo.iterdir())) == 1
    with target.open("r+b") as handle:
        handle.write(b"two")
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (target.stat().st_size, target.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert files.file_sha256(target, memo) == hashlib.sha256(b"two").hexdigest() != first
    assert files.stat_fingerprint(target) != seen


def test_canonical_json_does_not_depend_on_order() -> None:
    assert files.json_sha256({"a": 1, "b": [2.5]}) == files.json_sha256({"b": [2.5], "a": 1})
    with pytest.raises(ValueError):
        files.canonical_json(float("nan"))


def test_the_stat_fingerprint_sees_names_sizes_and_times_and_never_raises(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    (folder / "sub").mkdir(parents=True)
    (folder / "x.png").write_text("1")
    (folder / "sub" / "y.txt").write_text("2")
    seen = [files.stat_fingerprint(folder)]
    assert files.stat_fingerprint(folder) == seen[0]
    (folder / "sub" / "y.txt").write_text("22")
    seen.append(files.stat_fingerprint(folder))
    os.utime(folder / "x.png", (1, 1))
    seen.append(files.stat_fingerprint(folder))
    (folder / "x.png").rename(folder / "z.png")
    seen += [files.stat_fingerprint(folder), files.stat_fingerprint(folder / "z.png")]
    (folder / "broken").symlink_to(tmp_path / "nothing")
    (folder / os.fsdecode(b"\xff.png")).write_text("not valid Unicode")
    seen.append(files.stat_fingerprint(folder))
    assert len(set(seen)) == 6 and all(len(fingerprint) == 64 for fingerprint in seen)
    assert files.stat_fingerprint(tmp_path / "none") == "unreadable: FileNotFoundError"
    assert files.stat_fingerprint(tmp_path / "\0").startswith("unreadable: ")


LONG = "\u5b57" * 75  # 225 bytes: with its ending longer than a name may be


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "neither is empty"),
        (".hidden", "nor begins or ends with a dot"),
        ("a ", "nor begins or ends with a dot or a space"),
        ("..", "nor begins or ends with a dot"),
        ("a/b", "leave out '/'"),
        ("a\\b", r"leave out '\\\\'"),
        ("a\nb", r"leave out '\\n'"),
        ("a\tb", r"leave out '\\t'"),
        ("a\0b", r"leave out '\\x00'"),
        ('a"<b', "leave out '\"', '<'"),
        ("CON", "Windows reserves this name"),
        ("nul.v2", "Windows reserves this name"),
        ("a\ud83d", "half a character"),
        ("a.SafeTensors", "leave out .safetensors, which is added"),
        (LONG * 2, "takes 450 bytes as UTF-8: use at most 237"),
    ],
)
def test_names_that_no_file_can_have_everywhere_are_refused(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"lora_name is .*{reason}"):
        files.check_name("lora_name", name)


def test_good_names_are_accepted() -> None:
    for name in ("my_lora", "\u732b" * 40, "a.b", "v1.0 final", "consul", LONG):
        files.check_name("lora_name", name)
    files.check_name("lora_name", "styles/ink", subfolders=True)
    with pytest.raises(ValueError, match="neither is empty"):
        files.check_name("lora_name", "styles//ink", subfolders=True)


def test_a_folder_may_allow_only_shorter_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.longest_name(tmp_path / "not" / "there") == os.pathconf(tmp_path, "PC_NAME_MAX")
    monkeypatch.setattr(files, "longest_name", lambda folder: 143)
    files.require_file_names(tmp_path, {"lora_name": "x" * 125})
    with pytest.raises(ValueError, match="lora_name is 'x+…, whose name takes 126 bytes as UTF-8: use at most 125"):
        files.require_file_names(tmp_path, {"lora_name": "x" * 126})


def test_temporary_names_are_short_and_belong_to_their_file(tmp_path: Path) -> None:
    path, other = tmp_path / f"{'x' * 200}.safetensors", tmp_path / "other.safetensors"
    temporary = files.temporary_beside(path)
    assert len(temporary.name) < 60 and temporary.parent == tmp_path
    temporary.touch()
    files.temporary_beside(other).touch()
    assert list(files.leftovers_of(path)) == [temporary]
