"""Cached tensors that stay in main memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdxl_lora_core.cache.kept_tensors import KeptTensors


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for number, path in enumerate(paths):
        save_file({"values": torch.full((100,), float(number + 1))}, path)
    return paths


def test_a_file_is_read_once_and_its_values_no_longer_depend_on_it(files: list[Path]) -> None:
    kept = KeptTensors(10_000)
    first = kept.load(files[0])
    with files[0].open("r+b") as file:  # a mapping of the file would change with it
        file.seek(-400, 2)
        file.write(bytes(400))
    assert first["values"].tolist() == [1.0] * 100
    assert kept.load(files[0]) is first


def test_no_more_is_kept_than_the_limit(files: list[Path]) -> None:
    kept = KeptTensors(900)
    for _ in range(2):
        assert [kept.load(path)["values"][0].item() for path in files] == [1.0, 2.0, 3.0]
        assert kept.size == 800
    assert kept.load(files[1]) is kept.load(files[1])
    assert kept.load(files[2]) is not kept.load(files[2])


def test_a_quarter_of_the_free_memory_is_the_limit() -> None:
    assert 10e6 < KeptTensors().limit < 1e13
