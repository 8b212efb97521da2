"""Runs the other files in processes that have the stand-in accelerator: torch cannot take a device back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.standin.accelerator import unsupported

ROOT = Path(__file__).resolve().parents[2]
needs_private_names = pytest.mark.skipif(bool(unsupported()), reason=str(unsupported()))


def run(selection: str, file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.standin.plugin", "-p", "no:xdist", "-m", selection]
    done = subprocess.run([*command, f"tests/standin/{file}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@needs_private_names
@pytest.mark.timeout(900)
@pytest.mark.parametrize("file", ["training.py", "generation.py", "memory.py", "small_cards.py"])
def test_on_the_stand_in(file: str) -> None:
    run("not accept", file)


@needs_private_names
@pytest.mark.accept
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("file", ["training.py", "generation.py", "memory.py", "small_cards.py"])
def test_every_option_on_the_stand_in(file: str) -> None:
    run("accept", file)
