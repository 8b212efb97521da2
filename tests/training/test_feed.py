"""The next batch is prepared beside the present one, and changes nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxl_lora_core.sdxl.base import SDXLBase
from sdxl_lora_core.training.data.batches import Batch, PassOfUpdate, TrainingData
from sdxl_lora_core.training.data.feed import Feed
from tests.micro.runs import CPU, Cancelled, Train, cancel_at, data_of, load

PASSES = [PassOfUpdate(step, (step % 5,)) for step in range(4)]


@pytest.fixture
def data(micro_base: SDXLBase, pictures: Path, cache: Path) -> TrainingData:
    return data_of(micro_base, load(pictures), cache)


@pytest.fixture
def feed(data: TrainingData) -> Iterator[Feed]:
    feed = Feed(data, CPU)
    yield feed
    feed.close()


def same(one: Batch, other: Batch) -> bool:
    pairs = [(value, getattr(other, name)) for name, value in vars(one).items()]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def feed_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("sdxl_lora feed")]


def test_batches_are_those_of_the_data(feed: Feed, data: TrainingData) -> None:
    for current, following in zip(PASSES, [*PASSES[1:], None], strict=True):
        assert same(feed.batch(current, following), data.batch(current))


def test_the_following_batch_is_loaded_while_the_present_one_is_in_use(
    feed: Feed, data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, prepared = [], threading.Event()
    original = data.batch

    def watched(wanted: PassOfUpdate) -> Batch:
        loaded.append((wanted, threading.current_thread().name))
        if wanted == PASSES[1]:
            prepared.set()
        return original(wanted)

    monkeypatch.setattr(data, "batch", watched)
    feed.batch(PASSES[0], PASSES[1])
    assert prepared.wait(10), "nothing was prepared"
    feed.batch(PASSES[1], None)
    assert [wanted for wanted, _ in loaded] == PASSES[:2], "the prepared batch was loaded again"
    assert all(name.startswith("sdxl_lora feed") for _, name in loaded)


def test_another_pass_than_the_prepared_one_is_loaded(feed: Feed, data: TrainingData) -> None:
    """As when memory runs out and passes become smaller."""
    feed.batch(PASSES[0], PASSES[1])
    assert same(feed.batch(PASSES[3], None), data.batch(PASSES[3]))


def test_an_error_while_preparing_is_raised_by_its_own_pass(
    feed: Feed, data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = data.batch

    def broken(wanted: PassOfUpdate) -> Batch:
        if wanted == PASSES[1]:
            raise OSError("unreadable")
        return original(wanted)

    monkeypatch.setattr(data, "batch", broken)
    feed.batch(PASSES[0], PASSES[1])
    with pytest.raises(OSError, match="unreadable"):
        feed.batch(PASSES[1], None)


@pytest.mark.parametrize("more", [{}, {"on_step": cancel_at(2)}], ids=["finished", "cancelled"])
def test_no_thread_outlives_a_run(run: Train, more: dict[str, Any]) -> None:
    if more:
        with pytest.raises(Cancelled):
            run(**more)
    else:
        run()
    assert feed_threads() == []


def test_a_pass_whose_preparation_failed_is_prepared_again(
    feed: Feed, data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [torch.OutOfMemoryError("injected")]

    def failing(wanted: PassOfUpdate) -> Batch:
        if wanted.step == 1 and failures:
            raise failures.pop()
        return batch(wanted)

    batch = data.batch
    monkeypatch.setattr(data, "batch", failing)
    first, second = PassOfUpdate(0, (0,)), PassOfUpdate(1, (0,))
    feed.batch(first, second)
    with pytest.raises(torch.OutOfMemoryError):
        feed.batch(second, None)
    assert same(feed.batch(second, None), batch(second))
