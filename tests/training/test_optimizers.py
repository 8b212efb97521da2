"""Every optimizer, schedule and the moving average: closed forms, exact continuation, and what is refused."""

from __future__ import annotations

import csv
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from sdxl_lora_core.hashed_random import generator
from sdxl_lora_core.training.config.optimizer import Optimizer
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.evaluator import Evaluator
from sdxl_lora_core.training.model.flat_parameters import ParameterGroup
from sdxl_lora_core.training.optim.lr_schedule import lr_factor
from sdxl_lora_core.training.optim.optimizers import CLASSES, make_optimizer, set_learning_rates
from sdxl_lora_core.training.optim.weight_average import Averaging
from sdxl_lora_core.training.run.checkpoints import Checkpoints
from sdxl_lora_core.training.run.loop_state import LoopState
from sdxl_lora_core.training.train import TrainResult
from tests.micro.runs import SMALL, Cancelled, Train, Trained, cancel_at, load, lora_bytes

NAMES: tuple[Any, ...] = get_args(Optimizer)


def need(name: Optimizer) -> None:
    pytest.importorskip(CLASSES[name].partition(".")[0])


def with_optimizer(name: Optimizer, config: TrainConfig = SMALL, **settings: Any) -> TrainConfig:
    need(name)
    rate = 1.0 if name == "prodigy" else config.learning_rate
    return replace(config, optimizer=name, learning_rate=rate, **settings)


# Schedules


def rates(schedule: Any, **settings: Any) -> list[float]:
    config = TrainConfig(steps=110, lr_warmup_steps=10, lr_schedule=schedule, **settings)
    warm_up = [lr_factor(config, step) for step in range(10)]
    assert warm_up == pytest.approx([(step + 1) / 10 for step in range(10)])
    return [lr_factor(config, step) for step in range(10, 110)]


def test_schedules_match_their_closed_forms() -> None:
    shares = [step / 100 for step in range(100)]
    assert rates("constant") == [1.0] * 100
    assert rates("linear") == pytest.approx([1 - share for share in shares])
    assert rates("cosine") == pytest.approx([math.cos(math.pi * share / 2) ** 2 for share in shares])
    assert rates("polynomial") == pytest.approx([(1 - share) ** 2 for share in shares])
    assert rates("polynomial", lr_power=0.5) == pytest.approx([math.sqrt(1 - share) for share in shares])


@pytest.mark.parametrize(("cycles", "length"), [(3, 100 / 3), (4, 25), (1, 100)])
def test_a_cosine_with_restarts_begins_anew_each_cycle(cycles: int, length: float) -> None:
    settings = {} if cycles == 3 else {"lr_cycles": cycles}
    wanted = [math.cos(math.pi * math.fmod(step, length) / length / 2) ** 2 for step in range(100)]
    assert rates("cosine_with_restarts", **settings) == pytest.approx(wanted, abs=1e-9)


# The optimizers


@pytest.mark.parametrize(
    ("name", "class_name", "wanted"),
    [
        ("adamw", "AdamW", {"betas": (0.8, 0.95), "fused": True}),
        ("adamw_fused", "AdamW", {"betas": (0.8, 0.95), "fused": True}),
        ("adamw8bit", "AdamW8bit", {"betas": (0.8, 0.95)}),
        ("adafactor", "AdaFactor", {"betas": (None, 0.95), "relative_step": False, "scale_parameter": False}),
        ("lion", "Lion", {"betas": (0.8, 0.99)}),
        ("prodigy", "Prodigy", {"betas": (0.8, 0.95), "bias_correction": True, "safeguard_warmup": True}),
        ("came", "CAME", {"betas": (0.8, 0.95, 0.9999)}),
        ("schedule_free", "ScheduleFreeAdamW", {"betas": (0.8, 0.95), "warmup_steps": 0}),
    ],
)
def test_an_optimizer_gets_the_settings(name: Any, class_name: str, wanted: dict[str, Any]) -> None:
    betas: dict[str, Any] = {"adam_beta1": 0.8, "adam_beta2": 0.95}
    for unused in {"adafactor": ["adam_beta1"], "lion": ["adam_beta2"]}.get(name, []):
        del betas[unused]
    config = with_optimizer(name, weight_decay=0.3, **betas)
    optimizer = make_optimizer([ParameterGroup([nn.Parameter(torch.ones(2, 2))])], config)
    (group,) = optimizer.param_groups
    assert type(optimizer).__name__ == class_name
    assert {key: group[key] for key in wanted} == wanted
    assert group["lr"] == config.learning_rate and group["weight_decay"] == 0.3


def test_lions_step_is_the_papers() -> None:
    weight, gradient = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, -0.1]])
    parameter = nn.Parameter(weight.clone())
    optimizer = make_optimizer([ParameterGroup([parameter])], with_optimizer("lion", weight_decay=0.1))
    parameter.grad = gradient.clone()
    optimizer.step()
    torch.testing.assert_close(parameter.data, weight - 1e-3 * (gradient.sign() + 0.1 * weight))


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_brings_a_parabola_to_its_bottom(name: Any) -> None:
    config = with_optimizer(name, replace(SMALL, learning_rate=0.02, steps=400), weight_decay=0.0)
    if name != "schedule_free":
        config = replace(config, lr_schedule="linear")
    parameter = nn.Parameter(torch.full((3, 3), 2.0))
    groups = [ParameterGroup([parameter])]
    optimizer = make_optimizer(groups, config)
    averaging = Averaging([parameter], optimizer, config)
    for step in range(config.steps):
        set_learning_rates(optimizer, groups, config.learning_rate * lr_factor(config, step))
        parameter.grad = parameter.detach() - 1
        optimizer.step()
    with averaging.in_place():
        torch.testing.assert_close(parameter.data, torch.ones(3, 3), atol=0.05, rtol=0)


def groups_like_an_adapter(rate_factor: float) -> list[ParameterGroup]:
    shapes = [[(64, 96), (5,)], [(8, 3, 3, 3), (1,)]]
    draw = generator(0, 0, 0)
    first, second = ([nn.Parameter(torch.randn(shape, generator=draw)) for shape in group] for group in shapes)
    return [ParameterGroup(first), ParameterGroup(second, rate_factor)]


def take_steps(groups: Sequence[ParameterGroup], optimizer: torch.optim.Optimizer, steps: range, rate: float) -> None:
    for step in steps:
        set_learning_rates(optimizer, groups, rate * (1 + step))
        draw = generator(1, step, 0)
        for group in groups:
            for parameter in group.parameters:
                parameter.grad = torch.randn(parameter.shape, generator=draw)
        optimizer.step()


def weights_of(groups: Sequence[ParameterGroup]) -> list[Tensor]:
    return [parameter for group in groups for parameter in group.parameters]


@pytest.mark.parametrize("name", NAMES)
def test_any_state_comes_back_to_the_bit(name: Any, tmp_path: Path) -> None:
    """Large and small tensors, matrices, vectors and convolutions, two groups at two rates, several steps."""
    config = with_optimizer(name)
    factor = 1.0 if name == "prodigy" else 3.0
    whole, half, rest = (groups_like_an_adapter(factor) for _ in range(3))
    take_steps(whole, make_optimizer(whole, config), range(6), config.learning_rate)
    checkpoints = Checkpoints(tmp_path, "print")
    first = make_optimizer(half, config)
    take_steps(half, first, range(3), config.learning_rate)
    checkpoints.save(LoopState(step=3), weights_of(half), first, {}, lambda path: path.write_bytes(b""))
    second = make_optimizer(rest, config)
    saved = checkpoints.newest()
    assert saved
    saved.restore(weights_of(rest), second)
    take_steps(rest, second, range(3, 6), config.learning_rate)
    assert all(torch.equal(*pair) for pair in zip(weights_of(whole), weights_of(rest), strict=True))
    assert not any(torch.equal(*pair) for pair in zip(weights_of(half), weights_of(rest), strict=True))


def test_the_state_in_eight_bits_is_small(tmp_path: Path) -> None:
    config = with_optimizer("adamw8bit")
    groups = [ParameterGroup([nn.Parameter(torch.ones(512, 512))])]
    optimizer = make_optimizer(groups, config)
    take_steps(groups, optimizer, range(1), 1e-3)
    saved = Checkpoints(tmp_path, "print")
    saved.save(LoopState(step=1), [], optimizer, {}, lambda path: path.write_bytes(b""))
    assert (tmp_path / "step-000001" / "state.safetensors").stat().st_size < 2.2 * 512 * 512


@pytest.mark.parametrize("name", NAMES)
def test_a_cancelled_run_continues_to_the_same_bytes(run: Train, name: Any) -> None:
    config = with_optimizer(name, dropout=0.2, lr_warmup_steps=2)
    whole = run(config)
    with pytest.raises(Cancelled):
        run(config, where="b", on_step=cancel_at(2))
    assert lora_bytes(run(config, where="b")) == lora_bytes(whole)
    with safe_open(whole.lora_path, "pt") as file:
        assert file.metadata()["ss_optimizer"].startswith(CLASSES[name] + "(betas=(")
    ups = [tensor for key, tensor in load_file(whole.lora_path).items() if key.endswith("lora_up.weight")]
    assert ups and all(tensor.abs().max() > 0 for tensor in ups)


def test_groups_keep_their_own_rate() -> None:
    groups = groups_like_an_adapter(4.0)
    optimizer = make_optimizer(groups, with_optimizer("came"))
    set_learning_rates(optimizer, groups, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 2.0]


# Averages


def averaged(parameter: nn.Parameter, decay: float) -> Averaging:
    return Averaging([parameter], None, replace(SMALL, ema_decay=decay))


def test_the_moving_average_has_its_closed_form_and_leaves_the_parameters() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    averaging = averaged(parameter, 0.5)
    wanted = 0.0
    for step in range(1, 13):
        parameter.data.fill_(float(step))
        averaging.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * step
    with averaging.in_place():
        torch.testing.assert_close(parameter.data, torch.full((2,), wanted))
    assert parameter.tolist() == [12.0, 12.0]


def test_an_error_within_the_average_puts_the_parameters_back() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    averaging = averaged(parameter, 0.9)
    parameter.data.fill_(1.0)
    with pytest.raises(KeyError), averaging.in_place():
        assert parameter.tolist() == [0.0, 0.0]
        raise KeyError
    assert parameter.tolist() == [1.0, 1.0]


def losses_of(result: TrainResult) -> list[str]:
    with result.loss_chart.with_name("metrics.csv").open() as file:
        return [row["loss"] for row in csv.DictReader(file)]


def test_the_average_is_saved_and_validated_and_training_goes_on_without_it(trained: Trained) -> None:
    plain = trained(validation_percent=20)
    average = trained(replace(SMALL, ema_decay=0.9), validation_percent=20)
    assert losses_of(plain) == losses_of(average) != []
    assert lora_bytes(plain) != lora_bytes(average)
    assert plain.report.validation_loss != average.report.validation_loss
    assert plain.report.validation_loss_before == average.report.validation_loss_before


@pytest.mark.parametrize("settings", [{"ema_decay": 0.9}, {"optimizer": "schedule_free"}], ids=str)
def test_looking_at_the_average_never_changes_the_training(
    run: Train, trained: Trained, settings: dict[str, Any]
) -> None:
    need(settings.get("optimizer", "adamw"))
    config = replace(SMALL, **settings)
    whole, often = trained(config), replace(config, checkpoint_every=1)
    with pytest.raises(Cancelled):
        run(often, on_step=cancel_at(3))
    assert lora_bytes(run(often)) == lora_bytes(whole)


def test_the_best_average_is_kept_across_a_cancel(
    run: Train, trained: Trained, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = load_file(trained(replace(SMALL, ema_decay=0.9, steps=2), validation_percent=20).lora_path)
    monkeypatch.setattr(Evaluator, "validation_loss", lambda self, on_step: abs(self.state.step - 2.0))
    dataset = load(pictures, validation_percent=20)
    config = replace(SMALL, ema_decay=0.9, validate_every=1, keep_best="validation_loss")
    whole = run(config, dataset=dataset)
    assert all(torch.equal(tensor, short[name]) for name, tensor in load_file(whole.lora_path).items())
    with pytest.raises(Cancelled):
        run(config, where="c", dataset=dataset, on_step=cancel_at(3))
    assert lora_bytes(run(config, where="c", dataset=dataset)) == lora_bytes(whole)


def test_schedule_free_saves_its_average() -> None:
    """After Defazio et al., arXiv 2405.15682, at a constant rate the average is the plain mean of the fast iterates."""
    config = with_optimizer("schedule_free", weight_decay=0.0)
    groups = groups_like_an_adapter(1.0)
    optimizer = make_optimizer(groups, config)
    parameter, fast = groups[0].parameters[0], []
    for step in range(4):
        for each in weights_of(groups):
            each.grad = torch.randn(each.shape, generator=generator(2, step, 0))
        optimizer.step()
        fast.append(optimizer.state[parameter]["z"].clone())
    learning = parameter.detach().clone()
    with Averaging(weights_of(groups), optimizer, config).in_place():
        torch.testing.assert_close(parameter.data, torch.stack(fast).mean(dim=0), atol=1e-5, rtol=1e-5)
    assert torch.equal(parameter.data, learning) and not torch.equal(learning, fast[-1])


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer is 'sgd': choose one of adamw, adamw_fused"),
        ({"optimizer": "prodigy"}, "optimizer is 'prodigy' and learning_rate is 0.0001: .*so set it to 1"),
        ({"optimizer": "schedule_free", "lr_schedule": "cosine"}, "'schedule_free' and lr_schedule is 'cosine'"),
        ({"optimizer": "schedule_free", "ema_decay": 0.9}, "'schedule_free' and ema_decay is 0.9"),
        ({"optimizer": "schedule_free", "adam_beta1": 0.0}, "'schedule_free' and adam_beta1 is 0"),
    ],
)
def test_settings_that_contradict_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_prodigy_refuses_several_rates() -> None:
    with pytest.raises(ValueError, match="'prodigy', which finds one learning rate for all.* 2 different ones"):
        make_optimizer(groups_like_an_adapter(2.0), with_optimizer("prodigy"))


def test_a_device_without_fused_adamw_is_told() -> None:
    parameter = nn.Parameter(torch.ones(2, device="meta"))
    with pytest.raises(ValueError, match="optimizer is 'adamw_fused', which meta does not support: choose adamw"):
        make_optimizer([ParameterGroup([parameter])], with_optimizer("adamw_fused"))


@pytest.mark.parametrize(("name", "package"), [("lion", "pytorch-optimizer"), ("adamw8bit", "bitsandbytes")])
def test_a_missing_library_is_named_before_anything_is_opened(
    run: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: Any, package: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda library: None)
    with pytest.raises(ValueError, match=f"optimizer is '{name}'.*pip install {package}"):
        run(replace(SMALL, optimizer=name))
    assert not (tmp_path / "a").exists()
