from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sdxl_lora_core.sdxl.base import SDXLBase, load_part
from sdxl_lora_core.training.config.memory import Checkpointing
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.data.batches import PassOfUpdate
from sdxl_lora_core.training.job import TrainingJob
from sdxl_lora_core.training.model.adapters import Adapter
from sdxl_lora_core.training.model.trainable import TrainableSDXL
from sdxl_lora_core.training.optim.accumulation import shapes_of
from sdxl_lora_core.training.optim.memory_plan import Measured, plan_memory, set_checkpointing
from tests.micro.runs import SMALL, Train, change_losses, data_of, load, parameters_alive

MODES: tuple[Checkpointing, ...] = ("off", "selective", "on")
GB = 10**9


def unet_with_lora(base: SDXLBase) -> Any:
    unet: Any = load_part(base, "unet", torch.float32)
    Adapter(unet, TrainConfig(rank=2))
    return unet.train()


def forward(unet: Any) -> Tensor:
    return unet(
        torch.ones(1, 4, 16, 16),
        torch.tensor([500]),
        encoder_hidden_states=torch.ones(1, 77, 20),
        added_cond_kwargs={"text_embeds": torch.ones(1, 16), "time_ids": torch.ones(1, 6)},
    ).sample


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_the_count_is_what_a_real_pass_keeps(micro_base: SDXLBase, mode: Checkpointing, tmp_path: Path) -> None:
    unet = unet_with_lora(micro_base)
    set_checkpointing(unet, mode)
    counted = Measured(lambda: forward(unet), unet, [], tmp_path).saved_bytes()
    weights = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        result = forward(unet)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    assert counted == sum(size for address, size in storages.items() if address not in weights)
    assert result.requires_grad


@pytest.mark.slow
def test_each_mode_keeps_less_and_gives_the_same_gradients(micro_base: SDXLBase, tmp_path: Path) -> None:
    unet = unet_with_lora(micro_base)
    kept, gradients = [], []
    for mode in MODES:
        set_checkpointing(unet, mode)
        kept.append(Measured(lambda: forward(unet), unet, [], tmp_path).saved_bytes())
        forward(unet).square().sum().backward()
        gradients.append([p.grad.clone() for p in unet.parameters() if p.grad is not None])
        unet.zero_grad()
    assert kept[0] > 1.1 * kept[1] > 2 * kept[2]
    for others in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], others, strict=True))


# The count on disk


class Layers(nn.Module):
    """Keeps what comes between its two layers; `passes` says how often it was asked."""

    def __init__(self, inner: int = 8) -> None:
        super().__init__()
        self.first, self.drop, self.second = nn.Linear(4, inner), nn.Dropout(0.5), nn.Linear(inner, 4)
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.second(self.drop(self.first(x)))


def count(layers: Layers, cache: Path, images: int = 1) -> int:
    return Measured(lambda: layers(torch.ones(images, 4)), layers, [images, 4], cache).saved_bytes()


def test_a_count_is_found_on_disk_by_the_next_run(tmp_path: Path) -> None:
    first, second = Layers(), Layers()
    assert count(first, tmp_path) == count(second, tmp_path) == count(first, tmp_path) > 0
    assert (first.passes, second.passes) == (1, 0)


def frozen(layers: Layers) -> Layers:
    layers.first.requires_grad_(False)
    return layers


def double(layers: Layers) -> Layers:
    return layers.double()  # type: ignore[return-value]


@pytest.mark.parametrize(
    "change", [lambda _: Layers(9), nn.Module.eval, frozen, double], ids=["size", "mode", "frozen", "format"]
)
def test_another_model_or_mode_is_counted_anew(change: Callable[[Layers], Layers], tmp_path: Path) -> None:
    count(Layers(), tmp_path)
    changed = change(Layers())
    images = torch.ones(1, 4, dtype=changed.first.weight.dtype)
    Measured(lambda: changed(images), changed, [1, 4], tmp_path).saved_bytes()
    assert changed.passes == 1


def test_another_shape_is_counted_anew(tmp_path: Path) -> None:
    layers = Layers()
    assert count(layers, tmp_path, images=2) == 2 * count(layers, tmp_path)
    assert layers.passes == 2


@pytest.mark.parametrize("text", ["", '{"kept_by', "[]", "7", '{"kept_bytes": "7"}', '{"kept_bytes": -7}'])
def test_a_damaged_count_is_made_again(tmp_path: Path, text: str) -> None:
    counted = count(Layers(), tmp_path)
    (note,) = tmp_path.rglob("*.json")
    note.write_text(text)
    again, found = Layers(), Layers()
    assert count(again, tmp_path) == count(found, tmp_path) == counted
    assert (again.passes, found.passes) == (1, 0)


def test_a_disk_that_cannot_be_written_costs_only_the_count(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    layers = Layers()
    assert count(layers, tmp_path / "cache") == count(layers, tmp_path / "cache")
    assert layers.passes == 2


def test_captions_decide_the_shapes_only_for_encoders_that_learn(
    micro_base: SDXLBase, pictures: Path, cache: Path
) -> None:
    data = data_of(micro_base, load(pictures), cache)
    one = data.batch(PassOfUpdate(0, (0,)))
    other = replace(one, captions=("another caption",))
    learns = replace(SMALL, text_encoder_learning_rate=1e-4)
    assert shapes_of(one, SMALL) == shapes_of(other, SMALL)
    assert shapes_of(one, learns) != shapes_of(other, learns)
    longer = replace(one, embeds=torch.cat([one.embeds, one.embeds], dim=1))
    assert shapes_of(one, SMALL) != shapes_of(longer, SMALL)


@pytest.mark.usefixtures("real_plan")
def test_runs_of_one_shape_share_a_count_and_an_adapter_of_another_size_has_its_own(run: Train, tmp_path: Path) -> None:
    counts = []
    for where, rank in (("a", 2), ("b", 2), ("c", 3)):
        run(replace(SMALL, steps=1, rank=rank), where=where, cache=tmp_path / "cache")
        counts.append(len(list((tmp_path / "cache" / "memory").rglob("*.json"))))
    assert counts == [1, 1, 2]


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


class Modes(nn.Module):
    """A stand-in whose images keep 4 GB, 2 GB or 1 GB."""

    def __init__(self) -> None:
        super().__init__()
        self.mode = "off"


def planned(free_gb: float, wanted: Checkpointing = "auto", batch: int = 4) -> tuple[str, int, bool]:
    unet = Modes()
    sizes = {"off": 4 * GB, "selective": 2 * GB, "on": 1 * GB}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sdxl_lora_core.training.optim.memory_plan.set_checkpointing",
            lambda unet, mode: setattr(unet, "mode", mode),
        )
        measured: Any = SimpleNamespace(model=SimpleNamespace(unet=unet), saved_bytes=lambda: sizes[unet.mode])
        plan = plan_memory(measured, wanted, batch, 0, free_gb * GB)
    return plan.checkpointing, plan.images_per_pass, plan.tight


def test_the_fastest_plan_that_fits_is_taken() -> None:
    assert planned(80) == ("off", 4, False)
    assert planned(10) == ("off", 2, False)
    assert planned(5.5) == ("off", 1, False)
    assert planned(3.5) == ("selective", 1, False)
    assert planned(2) == ("on", 1, False)
    assert planned(1) == ("on", 1, True)
    assert planned(3, wanted="off") == ("off", 1, True)
    assert planned(80, wanted="selective") == ("selective", 4, False)


@pytest.mark.usefixtures("real_plan")
def test_a_low_limit_is_planned_for_and_changes_nothing_else(run: Train, caplog: pytest.LogCaptureFixture) -> None:
    plain = run(replace(SMALL, batch_size=2))
    low = run(replace(SMALL, batch_size=2, memory_limit_gb=0.001), where="b")
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
