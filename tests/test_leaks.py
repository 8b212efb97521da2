"""Trainings and generations in one process, as a ComfyUI that runs for days: memory stays flat."""

from __future__ import annotations

import ctypes
import gc
import sys
from dataclasses import replace

import psutil
import pytest
import torch

from sdxl_lora_core.lora.stack import LoRARef
from sdxl_lora_core.runtime.device import release_memory
from sdxl_lora_core.runtime.loaded_parts import LoadedParts
from sdxl_lora_core.sdxl.base import SDXLBase
from tests.micro.images import CPU, draw, settings
from tests.micro.runs import SMALL, Train, parameters_alive

MEGABYTE = 2**20
WATCHED = replace(SMALL, sample_prompts=("a picture",), sample_every=2, sample_steps=2, ema_decay=0.9)


def resident() -> int:
    """Bytes of memory that the process has, without what its allocator keeps for later."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' allocators return freed memory by themselves")
def test_freed_memory_goes_back_to_the_system() -> None:
    weights = [torch.ones(25_000) for _ in range(2000)]  # too small for mappings of their own
    last = torch.ones(25_000)  # keeps the heap's end in use
    full = psutil.Process().memory_info().rss
    del weights
    release_memory(CPU)
    assert full - psutil.Process().memory_info().rss > 100 * MEGABYTE
    assert last.sum() == 25_000


@pytest.mark.slow
@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.accept)])
def test_memory_is_flat_over_trainings_and_generations(run: Train, micro_base: SDXLBase, times: int) -> None:
    """Each generation has a new LoRA on the weights that are held. The memory plan has tests of its own."""
    alive, memory, parts = [], [], LoadedParts(CPU)
    for number in range(times):
        trained = run(replace(WATCHED, lora_name=f"run-{number}", seed=number))
        lora = LoRARef(trained.lora_path, trained.lora_name, 1.0, 1.0)
        draw(micro_base, settings(seed=number, steps=2, batch_size=2, count=2), [lora], parts=parts)
        alive.append(len(parameters_alive()))
        memory.append(resident())
    assert len(set(alive)) == 1
    early = memory[times // 4]  # libraries fill their own caches at first
    assert memory[-1] - early < 20 * MEGABYTE
