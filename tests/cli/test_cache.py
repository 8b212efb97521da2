"""The image cache from the command line and as a node."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_lora_core.cache import maintenance
from sdxl_lora_core.cache.image_cache import ImageCache
from sdxl_lora_core.cli.main import main
from sdxl_lora_core.generation.image_keys import key_of
from tools.run_workflow import ROOT, load_pack

NODE: Any = load_pack().NODE_CLASS_MAPPINGS["SDXLImageCache"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With three images of the same size in the cache."""
    monkeypatch.setenv("SDXL_LORA_HOME", str(tmp_path))
    cache = ImageCache(tmp_path / "user/sdxl_lora/images")
    for number in range(3):
        cache.store(key_of({"number": number}), np.full((8, 8, 3), number, np.uint8), {})
    return tmp_path


def damage(home: Path) -> str:
    """The key of the image that is not whole any more."""
    file = next(home.rglob("image.png"))
    file.write_bytes(file.read_bytes()[:-1])
    return file.parent.name


def two_and_a_half(home: Path) -> float:
    """Room for two of the three images, in GB."""
    return maintenance.stats(home / "user/sdxl_lora/images").size / 3 * 2.5 / maintenance.GB


def cache(home: Path, *arguments: str) -> None:
    main(["cache", *arguments, "--home", str(home / "user/sdxl_lora")])


def test_stats(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache(home, "stats")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 images, 0.00 GB of 10 GB" and lines[1].startswith("last used between 20")


def test_verify_fails_while_an_image_is_damaged(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache(home, "verify")
    assert capsys.readouterr().out.startswith("0 damaged images removed\n3 images, ")
    key = damage(home)
    with pytest.raises(SystemExit, match=f"1 damaged image; --remove deletes them:\n{key}"):
        cache(home, "verify")
    cache(home, "verify", "--remove")
    assert capsys.readouterr().out.startswith("1 damaged image removed\n2 images, ")


def test_prune_sets_the_limit_and_keeps_to_it(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache(home, "prune")
    cache(home, "prune", "--limit-gb", str(two_and_a_half(home)))
    out = capsys.readouterr().out
    assert "0 images removed" in out and "\n1 image removed, 0.00 GB\n2 images, " in out
    with pytest.raises(SystemExit, match="limit_gb is -1: set it to a size above 0"):
        cache(home, "prune", "--limit-gb", "-1")


def test_clear(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache(home, "clear")
    assert capsys.readouterr().out == "3 images removed, 0.00 GB\n"
    assert not list(home.rglob("image.png"))


@pytest.mark.parametrize("command", ["stats", "verify", "prune", "clear"])
def test_a_mistyped_folder_is_no_empty_cache(tmp_path: Path, command: str) -> None:
    with pytest.raises(SystemExit, match="there is no image cache in .*: set --home to its folder"):
        cache(tmp_path / "typo", command)
    assert not (tmp_path / "typo").exists()


# The node


def run(action: str = "show", limit_gb: float = 0.0) -> tuple[str, int, float]:
    shown = NODE().run(action, limit_gb)
    assert shown["ui"]["text"] == (shown["result"][0],)
    return shown["result"]


def test_the_node_is_whole() -> None:
    declared = NODE.INPUT_TYPES()["required"]
    assert list(declared) == ["action", "limit_gb"] and declared["limit_gb"][1]["default"] == 0.0
    assert declared["action"][0] == ["show", "prune", "verify"] and declared["action"][1]["default"] == "show"
    assert list(zip(NODE.RETURN_NAMES, NODE.RETURN_TYPES, strict=True)) == [
        ("report", "STRING"),
        ("images", "INT"),
        ("gigabytes", "FLOAT"),
    ]
    assert NODE.OUTPUT_NODE and NODE.DESCRIPTION and len(NODE.SEARCH_ALIASES) >= 3 and NODE.CATEGORY == "SDXL LoRA"
    assert len(NODE.OUTPUT_TOOLTIPS) == 3 and all(options["tooltip"] for _, options in declared.values())
    assert math.isnan(NODE.IS_CHANGED(action="show", limit_gb=0.0))
    page = (ROOT / "web/docs/SDXLImageCache.md").read_text(encoding="utf-8")
    assert all(f"- **{name}**: " in page for name in [*declared, *NODE.RETURN_NAMES])


def test_the_node_shows_the_cache(home: Path) -> None:
    report, images, gigabytes = run()
    assert images == 3 and gigabytes == maintenance.stats(home / "user/sdxl_lora/images").size / 1e9
    assert report.startswith("3 images, 0.00 GB of 10 GB\n")


def test_the_node_sets_the_limit_for_good(home: Path) -> None:
    assert "of 50 GB" in run(limit_gb=50)[0] and "of 50 GB" in run()[0]


def test_the_node_prunes(home: Path) -> None:
    room = two_and_a_half(home)
    report, images, _ = run("prune", room)
    assert images == 2 and report.startswith("1 image removed, 0.00 GB\n2 images, ")


def test_the_node_verifies_and_removes_what_is_damaged(home: Path) -> None:
    assert run("verify")[0].startswith("0 damaged images removed\n3 images")
    damage(home)
    assert run("verify")[0].startswith("1 damaged image removed\n2 images")


def test_the_node_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDXL_LORA_HOME", str(tmp_path))
    for action in ("show", "prune", "verify"):
        assert run(action)[1:] == (0, 0.0)
    assert not (tmp_path / "user").exists()
