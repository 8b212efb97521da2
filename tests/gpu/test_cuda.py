"""The main job on a CUDA device, with the random micro model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sdxl_lora_core.generation.config import GenerateConfig
from sdxl_lora_core.runtime.loaded_parts import LoadedParts
from sdxl_lora_core.sdxl.base import SDXLBase
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.loop import Loop
from tests.micro.images import draw
from tests.micro.runs import Cancelled, Train, cancel_at, parameters_alive

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda")


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.usefixtures("real_plan")
def test_training_gives_finite_weights_and_frees_the_memory(run: Train, tmp_path: Path, precision: Any) -> None:
    config = TrainConfig(steps=8, learning_rate=1e-3, precision=precision)
    cache = tmp_path / "cache"  # a new one, so that the plan measures
    run(config, where="first", cache=cache, device=CUDA)  # libraries allocate their workspace once
    before, alive = torch.cuda.memory_allocated(), parameters_alive()
    result = run(replace(config, seed=1), where="second", cache=cache, device=CUDA)
    tensors = load_file(result.lora_path)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if name.endswith("lora_up.weight"))
    assert not parameters_alive() - alive
    assert torch.cuda.memory_allocated() == before


def test_an_image_is_the_cpus_within_rounding_and_repeats_itself(micro_base: SDXLBase) -> None:
    config = GenerateConfig(prompt="a heart", steps=5, width=64, height=64)
    base = replace(micro_base, precision="fp32")
    first, second, cpu = (
        draw(base, config, parts=LoadedParts(device))[0].pixels.astype(np.int16)
        for device in (CUDA, CUDA, torch.device("cpu"))
    )
    assert np.array_equal(first, second)
    assert np.abs(first - cpu).max() <= 2


def test_offload_by_phase_leaves_nothing_on_the_device(micro_base: SDXLBase) -> None:
    parts = LoadedParts(CUDA)
    config = GenerateConfig(prompt="a heart", steps=2, width=64, height=64, offload="phase")
    draw(micro_base, config, parts=parts)  # libraries allocate their workspace once
    before = torch.cuda.memory_allocated()
    draw(micro_base, replace(config, seed=1), parts=parts)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("adapter", ["lora", "dora", "loha", "lokr"])
def test_a_deterministic_run_that_is_resumed_ends_in_the_same_bytes(run: Train, adapter: Any) -> None:
    config = TrainConfig(steps=6, adapter=adapter, deterministic=True, dropout=0.1 if adapter == "lora" else 0.0)
    whole = load_file(run(config, where="whole", device=CUDA).lora_path)
    for cut in (2, 5):
        with pytest.raises(Cancelled):
            run(config, where="resumed", device=CUDA, on_step=cancel_at(cut))
    resumed = load_file(run(config, where="resumed", device=CUDA).lora_path)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.usefixtures("real_plan")
@pytest.mark.parametrize("weights", ["full", "int8", "fp8"])
def test_offloaded_blocks_change_no_bit(run: Train, weights: Any) -> None:
    """Copies on the side stream arrive before they are used, and no memory is used again too early."""
    config = TrainConfig(steps=8, base_weights=weights, offload_blocks=0, deterministic=True)
    plain = load_file(run(config, where="plain", device=CUDA).lora_path)
    for number in (13, 1000):
        offloaded = run(replace(config, offload_blocks=number), where=f"offloaded {number}", device=CUDA)
        found = load_file(offloaded.lora_path)
        assert "blocks offloaded" in offloaded.report.memory
        assert all(torch.equal(tensor, found[name]) for name, tensor in plain.items())


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_an_update_never_waits_for_the_device(run: Train, optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    update = Loop.update

    def watched(self: Loop) -> None:
        torch.cuda.set_sync_debug_mode("error" if self.state.step else "default")  # the first step makes moments
        try:
            update(self)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Loop, "update", watched)
    result = run(TrainConfig(steps=6, optimizer=optimizer, snr_gamma=5.0, ema_decay=0.9), device=CUDA)
    assert result.report.steps == 6 and not result.report.skipped_steps
