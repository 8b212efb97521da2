"""Updates of the flat parameters: what a loss that is not finite leaves unchanged, and when losses are read."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.model.flat_parameters import FlatParameters, ParameterGroup
from sdxl_lora_core.training.optim.optimizers import make_optimizer, masked_step
from sdxl_lora_core.training.optim.updates import Updates
from sdxl_lora_core.training.run.loop_state import LoopState
from sdxl_lora_core.training.run.optimizer_state import restore_state, split_state


def updates_of(optimizer: Any) -> Updates:
    if optimizer not in ("adamw", "adamw_fused"):
        pytest.importorskip("pytorch_optimizer")
    torch.manual_seed(0)
    groups = [ParameterGroup([nn.Parameter(torch.randn(4, 3))]), ParameterGroup([nn.Parameter(torch.randn(5, 4))], 0.5)]
    flat = FlatParameters(groups, {}, torch.float32)
    config = TrainConfig(optimizer=optimizer, learning_rate=1e-2, ema_decay=0.5, lr_warmup_steps=0)
    return Updates(flat, config, torch.amp.GradScaler("cpu", enabled=False))


def step(updates: Updates, state: LoopState, *losses: float) -> None:
    updates.flat.gradients.copy_(torch.randn(updates.flat.gradients.shape))
    updates.apply(torch.tensor(losses), state)


def tensors(updates: Updates) -> list[Tensor]:
    """Values, average and moments."""
    moments, _ = split_state(updates.optimizer)
    return [updates.flat.values.clone(), *(average.clone() for average in updates.averaging.ema), *moments.values()]


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "came"])
def test_an_update_that_is_not_finite_changes_nothing(optimizer: Any) -> None:
    updates, state = updates_of(optimizer), LoopState()
    step(updates, state, 0.5)
    before = tensors(updates)
    step(updates, state, 0.25, math.nan)
    assert all(torch.equal(one, other) for one, other in zip(before, tensors(updates), strict=True))
    assert not updates.flat.gradients.any() and state.step == 2
    step(updates, state, 0.25, 0.5)
    assert not any(torch.equal(one, other) for one, other in zip(before[:3], tensors(updates)[:3], strict=True))
    updates.read_losses(state)
    assert state.skipped == [2] and state.losses[::2] == [0.5, 0.75] and math.isnan(state.losses[1])


def test_a_gradient_that_is_not_finite_is_skipped_too() -> None:
    updates, state = updates_of("adamw"), LoopState()
    before = updates.flat.values.clone()
    updates.flat.gradients.fill_(math.inf)
    updates.apply(torch.tensor([0.5]), state)
    updates.read_losses(state)
    assert torch.equal(updates.flat.values, before) and state.skipped == [1] and state.losses == [0.5]


def test_losses_are_read_when_they_are_asked_for() -> None:
    updates, state = updates_of("adamw"), LoopState()
    for loss in (1.0, 2.0, 3.0):
        step(updates, state, loss)
    assert state.losses == []
    updates.read_losses(state, late=1)
    assert state.losses == [1.0, 2.0]
    updates.read_losses(state)
    assert state.losses == [1.0, 2.0, 3.0] and len(state.learning_rates) == 3


def test_the_state_of_a_device_without_fused_adamw_is_continued_with_it() -> None:
    parameter = nn.Parameter(torch.ones(3))
    config = TrainConfig(optimizer="adamw")
    plain = torch.optim.AdamW([parameter], lr=1.0, fused=False)
    parameter.grad = torch.ones(3)
    plain.step()
    fused = make_optimizer([ParameterGroup([parameter])], config)
    restore_state(fused, *split_state(plain))
    assert [group["fused"] for group in fused.param_groups] == [True]
    before = parameter.detach().clone()
    masked_step(fused, torch.tensor(False))
    assert torch.equal(parameter, before)
    masked_step(fused, torch.tensor(True))
    assert not torch.equal(parameter, before) and fused.state[parameter]["step"] == 2
