from __future__ import annotations

from typing import Any

import pytest
import torch

from sdxl_lora_core.lora.merge_into_weights import merge_into
from sdxl_lora_core.sdxl.base import CONFIGS, SDXLBase, load_part
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.model.adapters import TARGETS, Adapter


def new_unet(base: SDXLBase) -> Any:
    return load_part(base, "unet", torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "ends"),
    [
        ("attention", {"to_q", "to_k", "to_v", "to_out.0"}),
        ("attention+ff", {"to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"}),
        ("all-linear", {"to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"}),
        ("all-linear+conv", set(TARGETS["all-linear+conv"])),
    ],
)
def test_a_preset_covers_its_modules_and_no_others(micro_base: SDXLBase, preset: Any, ends: set[str]) -> None:
    unet = new_unet(micro_base)
    wanted = {name for name, _ in unet.named_modules() if any(name.endswith(f".{end}") for end in ends)}
    adapter = Adapter(unet, TrainConfig(rank=2, target_modules=preset))
    assert set(adapter.modules()) == wanted


def test_the_full_size_model_has_560_and_722_modules() -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        config = UNet2DConditionModel.load_config(str(CONFIGS), subfolder="unet")
        unet: Any = UNet2DConditionModel.from_config(config)
    names = [name for name, _ in unet.named_modules()]
    counts = {p: sum(any(n.endswith("." + end) for end in ends) for n in names) for p, ends in TARGETS.items()}
    resnets, shortcuts, samplers = 17, 11, 4
    convolutions = 3 * resnets + shortcuts + samplers
    assert counts == {"attention": 560, "attention+ff": 700, "all-linear": 722, "all-linear+conv": 722 + convolutions}


def test_only_fp32_matrices_are_trained_and_they_change_nothing_at_the_start(micro_base: SDXLBase) -> None:
    unet = load_part(micro_base, "unet", torch.bfloat16)
    adapter = Adapter(unet, TrainConfig(rank=2))
    (group,) = adapter.groups
    parameters = group.parameters
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert sum(parameter.requires_grad for parameter in unet.parameters()) == len(parameters)
    assert all(module.up.abs().max() == 0 < module.down.abs().max() for module in adapter.modules().values())


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["attention", "all-linear+conv"])
def test_the_merged_matrices_act_as_the_adapter_does(micro_base: SDXLBase, preset: Any) -> None:
    unet = new_unet(micro_base)
    adapter = Adapter(unet, TrainConfig(rank=2, alpha=6, target_modules=preset))
    for number, parameter in enumerate(unet.parameters()):
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(number))
    merged = new_unet(micro_base)
    assert not merge_into(merged, adapter.modules(), 1.0).missing
    arguments = {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor(10),
        "encoder_hidden_states": torch.randn(1, 77, 20),
        "added_cond_kwargs": {"text_embeds": torch.randn(1, 16), "time_ids": torch.ones(1, 6)},
    }
    with torch.no_grad():
        wanted, plain = unet(**arguments).sample, new_unet(micro_base)(**arguments).sample
        torch.testing.assert_close(merged(**arguments).sample, wanted, atol=1e-5, rtol=1e-4)
    assert (wanted - plain).abs().max() > 1e-3
