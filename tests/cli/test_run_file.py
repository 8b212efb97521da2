"""run.yaml files as people edit them: a result, or one sentence with file, line and setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdxl_lora_core.cli.main import main
from sdxl_lora_core.cli.run_file import read_run

GOOD = """\
base:
  path: {base}
  precision: fp32
datasets:
- folder: {folder}
  resolution: 64
train:
  steps: 3
"""


@pytest.fixture
def good(micro_sdxl: Path, pictures: Path) -> str:
    return GOOD.format(base=micro_sdxl, folder=pictures)


def test_a_run_is_read_with_its_changes(good: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(good)
    job = read_run(tmp_path / "run.yaml", None, {"rank": 4})
    assert (job.config.steps, job.config.rank, len(job.dataset.entries)) == (3, 4, 5)


def test_an_empty_train_section_has_the_defaults(good: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(good.replace("  steps: 3\n", ""))
    assert read_run(tmp_path / "run.yaml", None).config.steps == 1000


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("path: ", 'path: "C:\\data\\x" # ', r"run.yaml line 2: .*escape.*write paths with / or in single quotes"),
        ("  steps: 3", "\tsteps: 3", "run.yaml line 8: .*indent with spaces instead of tabs"),
        ("  steps: 3", "  steps: [3", "run.yaml line 9: is not YAML"),
        ("  steps: 3", "  steps: three", "run.yaml line 7: train: steps is 'three': give a whole number from 1 to"),
        ("  steps: 3", "  stepz: 3", "run.yaml line 7: train: unknown setting stepz"),
        ("  steps: 3", "  - steps", r"run.yaml line 7: train has \['steps'\]: write settings as name: value"),
        ("  path: ", "  paths: ", "run.yaml line 1: base: unknown setting paths; known are path, precision"),
        ("  path: ", "  precision: fp16 # ", "run.yaml line 1: base: path is None: give a path as text"),
        ("precision: fp32", "precision: fp8", "precision is 'fp8': choose one of"),
        ("- folder: ", "  folder: ", "run.yaml line 4: datasets is not a list: write one entry for each folder"),
        ("- folder: ", "- folders: ", "run.yaml line 4: datasets: folder is None: give a path as text"),
        ("  resolution: 64", "  resolution: 63", "run.yaml line 4: datasets: .*resolution"),
        ("- folder: ", "- ", "run.yaml line 4: datasets|is not YAML"),
        ("train:", "training:", "run.yaml is not a run: it needs the section train"),
        ("base:", "- base:", "is not YAML|is not a run"),
        ("datasets:", "datasets: []\nvalidation:", "run.yaml line 4: datasets is empty"),
    ],
)
def test_what_is_wrong_is_one_sentence_with_file_line_and_setting(
    good: str, tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in good
    (tmp_path / "run.yaml").write_text(good.replace(old, new))
    with pytest.raises(ValueError, match=message) as caught:
        read_run(tmp_path / "run.yaml", None)
    assert "\n" not in str(caught.value)


OTHER_FILES = [b"", b"\xff\xfe", b"just text", b"- a", b"base: {}\ndatasets: {}\ntrain: {}", b"[" * 5000]


@pytest.mark.parametrize("content", OTHER_FILES)
def test_other_files_end_the_command_with_a_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(SystemExit, match="^sdxl-lora: run.yaml"):
        main(["train", str(tmp_path / "run.yaml"), "--home", str(tmp_path), "--output", str(tmp_path)])
