"""The bytes of a training step, counted on fake tensors, are those that the stand-in accelerator allocates.

Collected by name only, in a process with `-p tests.standin.plugin`: see test_standin.py.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from PIL import Image
from torch import Tensor

from sdxl_lora_core.cache.folders import CacheFolders
from sdxl_lora_core.dataset.caption_dataset import load_caption_dataset
from sdxl_lora_core.dataset.config import DatasetConfig
from sdxl_lora_core.sdxl.base import SDXLBase, empty_part, load_part, open_base
from sdxl_lora_core.training.config.memory import Checkpointing
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.data.batches import PassOfUpdate, TrainingData
from sdxl_lora_core.training.job import RunContext, TrainingJob
from sdxl_lora_core.training.loop import Loop
from sdxl_lora_core.training.model.adapters import Adapter
from sdxl_lora_core.training.model.checkpointing import set_checkpointing
from sdxl_lora_core.training.model.flat_parameters import FlatParameters
from sdxl_lora_core.training.optim.memory_count import StorageCount, fake_tensors
from sdxl_lora_core.training.optim.memory_measure import MeasuredRun
from sdxl_lora_core.training.run.runs import RunFolders
from tests.standin.accelerator import ACCEL, NAME

SIDE = 64  # of the latents, so that activations weigh more than weights
DTYPE = torch.bfloat16


@pytest.fixture
def base(request: pytest.FixtureRequest, micro_base: SDXLBase) -> SDXLBase:
    tiny = Path(__file__).resolve().parents[2] / "assets" / "tiny-sdxl"
    return micro_base if request.param == "micro" else open_base(tiny)


def with_adapter(unet: Any, config: TrainConfig, mode: Checkpointing) -> FlatParameters:
    adapter = Adapter(unet, config)
    flat = FlatParameters(adapter.groups, adapter.scales, DTYPE)
    adapter.fuse(flat)
    set_checkpointing(unet, mode)
    unet.train(config.adapter in ("lora", "dora"))  # peft's LoHa and LoKr read a random number in training
    return flat


def step(unet: Any, flat: FlatParameters, device: str) -> None:
    """The first step of AdamW, which makes its state."""
    trained = [parameter for group in flat.groups_for(elementwise=True) for parameter in group.parameters]
    optimizer = torch.optim.AdamW(trained, foreach=False)
    predict(unet, device).float().square().mean().backward()
    flat.collect()
    optimizer.step()
    flat.refresh()


def predict(unet: Any, device: str) -> Tensor:
    sizes, inputs = unet.config, {"device": device, "dtype": DTYPE}
    pooled = sizes.projection_class_embeddings_input_dim - 6 * sizes.addition_time_embed_dim
    return unet(
        torch.ones(1, 4, SIDE, SIDE, **inputs),
        torch.ones(1, dtype=torch.long, device=device),
        encoder_hidden_states=torch.ones(1, 77, sizes.cross_attention_dim, **inputs),
        added_cond_kwargs={"text_embeds": torch.ones(1, pooled, **inputs), "time_ids": torch.ones(1, 6, **inputs)},
    ).sample


def on_device(base: SDXLBase, config: TrainConfig, mode: Checkpointing) -> tuple[int, int]:
    """Bytes before a step, and at most."""
    unet = load_part(base, "unet", DTYPE, NAME)
    flat = with_adapter(unet, config, mode)
    before = ACCEL.peak = ACCEL.allocated
    step(unet, flat, NAME)
    return before, ACCEL.peak


def counted(base: SDXLBase, config: TrainConfig, mode: Checkpointing) -> tuple[int, int]:
    with fake_tensors(), StorageCount() as count:
        unet = empty_part(base, "unet", DTYPE)
        flat = with_adapter(unet, config, mode)
        before = count.peak = count.allocated
        step(unet, flat, "cpu")
        return before, count.peak


def case(base: str, adapter: str, mode: str, *marks: pytest.MarkDecorator) -> Any:
    return pytest.param(base, adapter, mode, id=f"{base} {adapter} {mode}", marks=marks)


@pytest.mark.parametrize(
    ("base", "adapter", "mode"),
    [
        case("micro", "lora", "off"),
        case("tiny", "lora", "off"),
        case("tiny", "lora", "selective"),
        case("tiny", "lora", "on"),
        case("micro", "dora", "on", pytest.mark.accept),
        case("tiny", "dora", "off", pytest.mark.accept),
        case("tiny", "loha", "off", pytest.mark.accept),
        case("tiny", "lokr", "on", pytest.mark.accept),
    ],
    indirect=["base"],
)
def test_a_step_takes_what_was_counted(base: SDXLBase, adapter: Any, mode: Checkpointing) -> None:
    config = TrainConfig(rank=4, alpha=4.0, adapter=adapter)
    before, peak = on_device(base, config, mode)
    gc.collect()
    assert not ACCEL.allocated
    expected_before, expected_peak = counted(base, config, mode)
    assert expected_before == before
    assert expected_peak - before == pytest.approx(peak - before, rel=0.005)


PLANS: dict[str, dict[str, Any]] = {
    "nothing saved": {"gradient_checkpointing": "off"},
    "selective": {"gradient_checkpointing": "selective"},
    "checkpointing": {"gradient_checkpointing": "on"},
    "two images": {"gradient_checkpointing": "off", "batch_size": 2, "ema_decay": 0.9},
    "int8": {"gradient_checkpointing": "on", "base_weights": "int8"},
    "everything offloaded": {"gradient_checkpointing": "on", "offload_blocks": 1000},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images, and what is cached of them."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(2):
        Image.new("RGB", (512, 512), (40 * number, 90, 10)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a picture")
    return folder


@pytest.mark.usefixtures("real_plan")
@pytest.mark.parametrize("settings", PLANS.values(), ids=PLANS)
def test_a_plan_is_right_within_ten_percent(
    micro_base: SDXLBase, folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Without the reserve for libraries, against the peak of two updates of the real loop; the first makes moments."""
    dataset = load_caption_dataset(folder, DatasetConfig(resolution=512))
    config = TrainConfig(rank=2, precision="bf16", **settings)
    data = TrainingData(TrainingJob(micro_base, dataset, config), CacheFolders(folder / "cache"), torch.device(NAME, 0))
    data.cache(lambda *_: None)
    gc.collect()
    start = ACCEL.allocated
    unused: Any = None
    context = RunContext(RunFolders(tmp_path, tmp_path, data.folders, lambda name: False), data.device)
    loop = Loop(data, context, MagicMock(**{"run.checkpoints.newest.return_value": None}), unused)
    set_checkpointing(loop.model.unet, loop.state.gradient_checkpointing)
    ACCEL.peak = ACCEL.allocated
    for _ in range(2):
        loop.update()
    taken = ACCEL.peak - start
    measured = MeasuredRun(
        data.job, data.device, lambda n: data.batch(PassOfUpdate(0, (0,) * n)), data.folders.memory_plans
    )
    state = loop.state
    planned = measured.resting(state.base_weights, state.offloaded_blocks)
    planned += measured.step(state.gradient_checkpointing, state.images_per_pass)
    loop.__exit__()
    assert planned == pytest.approx(taken, rel=0.1)
