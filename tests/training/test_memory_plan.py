"""The memory plan: what a step takes by the count, which plan is chosen, and that a run follows it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sdxl_lora_core.runtime.device import DeviceMemory
from sdxl_lora_core.sdxl.base import SDXLBase
from sdxl_lora_core.training.config.memory import Checkpointing, MemorySettings
from sdxl_lora_core.training.config.presets import with_preset
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.data.batches import PassOfUpdate, TrainingData
from sdxl_lora_core.training.job import TrainingJob
from sdxl_lora_core.training.model.base_weights import StoredLayer
from sdxl_lora_core.training.model.trainable import TrainableSDXL
from sdxl_lora_core.training.optim.memory_measure import MeasuredRun, shapes_of
from sdxl_lora_core.training.optim.memory_plan import RESERVE, MemoryPlan, plan_memory
from tests.micro.runs import CPU, SMALL, Train, change_losses, data_of, load, parameters_alive

MODES: tuple[Checkpointing, ...] = ("off", "selective", "on")
GB = 10**9


# The count


def measured(data: TrainingData, folder: Path) -> MeasuredRun:
    return MeasuredRun(data.job, CPU, lambda images: data.batch(PassOfUpdate(0, (0,) * images)), folder)


@pytest.fixture
def data(micro_base: SDXLBase, pictures: Path, cache: Path) -> TrainingData:
    return data_of(micro_base, load(pictures), cache)


def test_each_mode_takes_less_and_each_image_the_same(data: TrainingData, tmp_path: Path) -> None:
    run = measured(data, tmp_path)
    off, selective, on = (run.step(mode, 1) for mode in MODES)
    assert off > 1.1 * selective > 1.2 * on
    assert run.step("off", 4) == off + 3 * (run.step("off", 2) - off)
    assert run.step("off", 4) > 2 * off


def test_less_rests_on_the_device_with_fewer_bits_and_offloaded_blocks(data: TrainingData, tmp_path: Path) -> None:
    run = measured(data, tmp_path)
    assert run.blocks == 38
    assert run.resting("full", 0) > run.resting("int8", 0) == run.resting("fp8", 0) > run.resting("int8", run.blocks)
    assert run.resting("full", 0) > run.resting("full", run.blocks)


@pytest.mark.parametrize(
    ("settings", "more"), [({"ema_decay": 0.9}, 1), ({"optimizer": "prodigy", "learning_rate": 1.0}, 2)]
)
def test_averages_and_moments_are_counted(
    micro_base: SDXLBase, pictures: Path, cache: Path, tmp_path: Path, settings: dict[str, Any], more: int
) -> None:
    plain, other = (data_of(micro_base, load(pictures), cache, **values) for values in ({}, settings))
    values = TrainableSDXL(plain.job, CPU).flat.values.nbytes
    apart = measured(other, tmp_path).resting("full", 0) - measured(plain, tmp_path).resting("full", 0)
    assert apart == more * values


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The counts that are made, not found. Each is 1000 bytes, because a real one takes seconds."""
    made: list[str] = []

    def count(self: MeasuredRun, mode: Checkpointing, images: int) -> int:
        made.append(f"{mode} {images}")
        return 1000

    monkeypatch.setattr(MeasuredRun, "_count_step", count)
    return made


def test_a_count_is_found_on_disk_by_the_next_run(data: TrainingData, tmp_path: Path, counts: list[str]) -> None:
    first, second = (measured(data, tmp_path).step("on", 1) for _ in range(2))
    assert first == second == 1000 and counts == ["on 1"]
    assert measured(data, tmp_path).resting("int8", 3) == measured(data, tmp_path / "other").resting("int8", 3)


@pytest.mark.parametrize(
    "changes", [{"rank": 3}, {"adapter": "dora"}, {"dropout": 0.5}, {"precision": "bf16"}, {"blocks": ""}], ids=str
)
def test_another_adapter_or_precision_is_counted_anew(
    micro_base: SDXLBase, pictures: Path, cache: Path, tmp_path: Path, counts: list[str], changes: dict[str, Any]
) -> None:
    for settings in ({}, changes):
        measured(data_of(micro_base, load(pictures), cache, **settings), tmp_path).step("on", 1)
    assert len(counts) == 2


def test_settings_that_change_no_shape_share_a_count(
    micro_base: SDXLBase, pictures: Path, cache: Path, tmp_path: Path, counts: list[str]
) -> None:
    for settings in ({}, {"learning_rate": 1e-5, "steps": 9, "lora_plus_ratio": 4.0, "seed": 3}):
        measured(data_of(micro_base, load(pictures), cache, **settings), tmp_path).step("on", 1)
    assert len(counts) == 1


@pytest.mark.parametrize("text", ["", '{"on 1', "[]", "7", '{"on 1": "7"}', '{"on 1": -7}'])
def test_a_damaged_count_is_made_again(data: TrainingData, tmp_path: Path, counts: list[str], text: str) -> None:
    counted = measured(data, tmp_path).step("on", 1)
    (note,) = tmp_path.rglob("*.json")
    note.write_text(text)
    assert measured(data, tmp_path).step("on", 1) == measured(data, tmp_path).step("on", 1) == counted
    assert len(counts) == 2


def test_a_disk_that_cannot_be_written_costs_only_the_count(
    data: TrainingData, tmp_path: Path, counts: list[str]
) -> None:
    (tmp_path / "cache").touch()
    assert measured(data, tmp_path / "cache").step("on", 1) == measured(data, tmp_path / "cache").step("on", 1)
    assert len(counts) == 2


def test_captions_decide_the_shapes_only_for_encoders_that_learn(data: TrainingData) -> None:
    one = data.batch(PassOfUpdate(0, (0,)))
    other = replace(one, captions=("another caption",))
    learns = replace(SMALL, text_encoder_learning_rate=1e-4)
    assert shapes_of(one, SMALL) == shapes_of(other, SMALL)
    assert shapes_of(one, learns) != shapes_of(other, learns)
    longer = replace(one, embeds=torch.cat([one.embeds, one.embeds], dim=1))
    assert shapes_of(one, SMALL) != shapes_of(longer, SMALL)


@pytest.mark.usefixtures("real_plan", "counts")
def test_runs_of_one_shape_share_a_count_and_an_adapter_of_another_size_has_its_own(run: Train, tmp_path: Path) -> None:
    files = []
    for where, rank in (("a", 2), ("b", 2), ("c", 3)):
        run(replace(SMALL, steps=1, rank=rank), where=where, cache=tmp_path / "cache")
        files.append(len(list((tmp_path / "cache" / "memory").rglob("*.json"))))
    assert files == [1, 1, 2]


KINDS = {
    "DoRA": replace(SMALL, adapter="dora"),
    "LoHa that drops modules": replace(SMALL, adapter="loha", module_dropout=0.5),
    "LoKr": replace(SMALL, adapter="lokr"),
    "dropout, kernels, bf16": replace(SMALL, dropout=0.5, target_modules="all-linear+conv", precision="bf16"),
    "PiSSA, fp16": replace(SMALL, init="pissa", precision="fp16"),
    "encoders, long captions": replace(
        SMALL, text_encoder_learning_rate=1e-4, text_encoder_2_learning_rate=1e-4, caption_chunks=2
    ),
    "new tokens alone": TrainConfig(lora_name="small", train_unet=False, new_tokens="picture"),
}


@pytest.mark.usefixtures("real_plan")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_training_can_be_planned_and_learns_after_that(run: Train, kind: str) -> None:
    result = run(replace(KINDS[kind], steps=1, batch_size=1))
    assert "gradient checkpointing off, 1 images a pass" in result.report.memory
    assert result.report.skipped_steps == []


# The choice


class Sizes:
    """A base of 5 GB, 2.6 GB in int8, in 90 blocks; an image takes 6, 3.6 or 0.8 GB."""

    blocks = 90

    def resting(self, weights: str, offloaded: int) -> int:
        size = 5.0 if weights == "full" else 2.6
        return int((size * (1 - offloaded / 90) + 0.2 * bool(offloaded) + 0.5) * GB)

    def step(self, checkpointing: str, images: int) -> int:
        return int({"off": 6.0, "selective": 3.6, "on": 0.8}[checkpointing] * images * GB)


def planned(free: float, batch: int = 1, least: bool = False, **settings: Any) -> tuple[str, str, int, int, bool]:
    plan = plan_memory(Sizes(), MemorySettings(batch_size=batch, **settings), free * GB, least)
    assert plan.tight == (plan.needed > free * GB)
    return plan.checkpointing, plan.base_weights, plan.offloaded_blocks, plan.images_per_pass, plan.tight


def test_the_fastest_plan_that_fits_is_taken() -> None:
    assert planned(80) == ("off", "full", 0, 1, False)
    assert planned(10.5) == ("selective", "full", 0, 1, False)
    assert planned(11, base_weights="auto") == ("off", "int8", 0, 1, False)
    assert planned(8, base_weights="auto") == ("selective", "int8", 0, 1, False)
    mode, weights, offloaded, _, tight = planned(3.5, base_weights="auto")
    assert (mode, weights, tight) == ("on", "int8", False) and 0 < offloaded < 90
    assert planned(2, base_weights="auto")[0] == "on" and planned(2, base_weights="auto")[2:] == (90, 1, True)


def test_only_as_many_blocks_are_offloaded_as_needed() -> None:
    counts = [planned(free, gradient_checkpointing="on")[2] for free in (7, 6, 5, 4, 3)]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] > 60
    assert planned(5, offload_blocks=0) == ("on", "full", 0, 1, True)
    assert planned(80, offload_blocks=1000) == ("off", "full", 90, 1, False)


def test_a_pass_is_halved_before_anything_is_computed_again() -> None:
    assert planned(80, batch=4) == ("off", "full", 0, 4, False)
    assert planned(20, batch=4) == ("off", "full", 0, 2, False)
    assert planned(80, batch=4, images_per_pass=2) == ("off", "full", 0, 2, False)


def test_what_is_set_is_kept() -> None:
    assert planned(3, gradient_checkpointing="off", base_weights="fp8", offload_blocks=3)[:3] == ("off", "fp8", 3)
    assert planned(80, gradient_checkpointing="selective") == ("selective", "full", 0, 1, False)


def test_the_least_is_taken_where_it_is_asked_for() -> None:
    assert planned(80, batch=4, least=True) == ("on", "full", 90, 1, False)


def test_the_plan_says_what_it_is() -> None:
    plan = MemoryPlan("on", 2, "int8", 12, int(4.2 * GB))
    words = (
        "gradient checkpointing on, base weights int8, 12 blocks offloaded, 2 images a pass: about 4.2 GB needed of "
    )
    assert plan.reason(8 * GB) == words + "8.0 GB free"
    assert plan.reason(float("inf")) == words + "an unknown amount of memory"


@pytest.mark.parametrize(("preset", "limit"), [("low memory (8 GB)", 7.0), ("low memory (6 GB)", 4.5)])
def test_a_preset_for_a_small_card_asks_for_a_plan_within_it(preset: Any, limit: float) -> None:
    config = TrainConfig(**with_preset({}, preset)[0])
    assert (config.memory_limit_gb, config.base_weights, config.offload_blocks) == (limit, "auto", -1)
    plan = plan_memory(Sizes(), config, config.memory_limit_gb * GB)
    assert plan.needed <= limit * GB


# A run follows its plan


class Little(DeviceMemory):
    """A device with little memory, which notes what is taken."""

    def __init__(self, size: float, least: bool = False) -> None:
        super().__init__(CPU)
        self.size, self._least = size, least
        self.taken: list[int] = []

    @property
    def least(self) -> bool:
        return self._least

    def free(self) -> float:
        return self.size

    def take(self, size: int) -> None:
        self.taken.append(size)


def stored_layers(monkeypatch: pytest.MonkeyPatch) -> list[list[StoredLayer]]:
    found: list[list[StoredLayer]] = []
    predict = TrainableSDXL.predict

    def noting(self: TrainableSDXL, batch: Any) -> Tensor:
        if batch.latents.dtype == torch.float32 and not isinstance(batch.latents, torch._subclasses.FakeTensor):
            found.append([module for module in self.modules() if isinstance(module, StoredLayer)])
        return predict(self, batch)

    monkeypatch.setattr(TrainableSDXL, "predict", noting)
    return found


@pytest.mark.usefixtures("real_plan")
def test_a_run_on_a_small_device_offloads_and_learns_the_same(run: Train) -> None:
    """An offloaded block changes no bit, and a resumed run keeps the plan."""
    least = Little(1.0, least=True)
    config = replace(SMALL, gradient_checkpointing="on", batch_size=1)
    plain = run(config)
    small = run(config, where="b", memory=least)
    assert "38 blocks offloaded" in small.report.memory and "offloaded" not in plain.report.memory
    assert least.taken and least.taken[0] > RESERVE
    assert all(torch.equal(one, other) for one, other in _pairs(plain, small))


def _pairs(one: Any, other: Any) -> list[tuple[Tensor, Tensor]]:
    ours, theirs = load_file(one.lora_path), load_file(other.lora_path)
    assert ours.keys() == theirs.keys()
    return [(ours[name], theirs[name]) for name in ours]


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_base_weights_are_stored_in_the_format_asked_for(
    run: Train, form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = stored_layers(monkeypatch)
    plain, small = run(SMALL), run(replace(SMALL, base_weights=form), where="b")
    kinds = {layer.values.dtype for layer in layers[-1] if layer.values is not None}
    assert kinds == {torch.int8 if form == "int8" else torch.float8_e4m3fn}
    assert f"base weights {form}" in small.report.memory
    assert small.report.loss == pytest.approx(plain.report.loss, rel=0.02)
    assert not all(torch.equal(one, other) for one, other in _pairs(plain, small))


def test_a_device_without_fp8_is_answered_before_anything_else(run: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.float8_e4m3fn in args:
            raise TypeError("Trying to convert Float8_e4m3fn to the MPS backend but it does not have support for it")
        return moved(self, *args, **kwargs)

    moved = Tensor.to
    monkeypatch.setattr(Tensor, "to", to)
    phases: list[str] = []
    with pytest.raises(ValueError, match="base_weights is 'fp8', which cpu does not support: choose int8"):
        run(replace(SMALL, base_weights="fp8"), on_step=lambda report: phases.append(report.phase))
    assert not phases
    run(replace(SMALL, base_weights="int8", steps=1))


def test_dora_needs_the_base_in_full() -> None:
    with pytest.raises(ValueError, match="base_weights is 'int8' and adapter is 'dora'"):
        TrainConfig(adapter="dora", base_weights="int8")
    TrainConfig(adapter="dora", offload_blocks=3)


@pytest.mark.usefixtures("real_plan")
def test_a_low_limit_is_planned_for_and_changes_nothing_else(run: Train, caplog: pytest.LogCaptureFixture) -> None:
    plain = run(replace(SMALL, batch_size=2))
    low = run(replace(SMALL, batch_size=2, memory_limit_gb=0.001, offload_blocks=0), where="b")
    assert "gradient checkpointing off, 2 images a pass" in plain.report.memory
    assert "gradient checkpointing on, 1 images a pass" in low.report.memory
    assert "may not fit" in caplog.text
    ours, theirs = load_file(low.lora_path), load_file(plain.lora_path)
    assert all((ours[name] - theirs[name]).abs().max() < 1e-5 for name in theirs)


def test_images_per_pass_cuts_the_batch(run: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    change_losses(
        monkeypatch, lambda losses, learner, batch, step: sizes.append(len(batch.latents)) or losses(learner, batch)
    )
    run(replace(SMALL, batch_size=2, images_per_pass=1, steps=2))
    assert set(sizes) == {1}


def test_the_noise_schedule_is_on_the_device_before_the_plan_looks_for_it(micro_base: SDXLBase) -> None:
    """Moved in the plan's pass, which has no contents, it would have none in the steps either."""
    nothing: Any = None
    learner = TrainableSDXL(TrainingJob(micro_base, nothing, replace(SMALL, precision="fp32")), torch.device("meta"))
    assert learner.objective.scheduler.alphas_cumprod.device.type == "meta"


@pytest.mark.usefixtures("real_plan")
def test_a_finished_training_leaves_no_parameter_behind(run: Train, tmp_path: Path) -> None:
    before = parameters_alive()
    for place in ("a", "b"):
        run(replace(SMALL, steps=1), where=place, cache=tmp_path / "cache")  # a new cache, so that the first one counts
    assert not parameters_alive() - before
