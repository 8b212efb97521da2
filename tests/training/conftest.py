"""Processes that the tests of training start and kill."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def forks() -> Iterator[BaseContext]:
    """Forks of one process that has everything imported, so that a run costs a second."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.killed_runs", "tests.training.ranks"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield context
