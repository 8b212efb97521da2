"""Every kind of adapter: what is saved acts as what was trained, training starts at the base, and resume is exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdxl_lora_core.lora.describe import describe_lora
from sdxl_lora_core.lora.files import read_lora, write_lora
from sdxl_lora_core.lora.merge_into_weights import merge_into
from sdxl_lora_core.lora.modules import LoRAFile
from sdxl_lora_core.lora.writing import peft_state_dict
from sdxl_lora_core.sdxl.base import SDXLBase, load_part
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.model.adapters import Adapter
from tests.micro.runs import SMALL, WHOLE, Cancelled, Train, cancel_at, lora_bytes

KERNELS = {"target_modules": "all-linear+conv"}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": "lora", **KERNELS},
    "lora, rank-stabilised": {"adapter": "lora", "use_rslora": True, **KERNELS},
    "lora, ranks of blocks": {"adapter": "lora", "block_ranks": "up_blocks.0=4, up_blocks.0.attentions.1=2", **KERNELS},
    "lora, pissa": {"init": "pissa", "target_modules": "all-linear"},
    "dora": {"adapter": "dora", **KERNELS},
    "dora, pissa, rank-stabilised": {"adapter": "dora", "init": "pissa", "use_rslora": True},
    "loha": {"adapter": "loha", **KERNELS},
    "loha, ranks of blocks": {"adapter": "loha", "block_ranks": "mid_block=2", **KERNELS},
    "lokr, one matrix factored": {"adapter": "lokr", "rank": 1, **KERNELS},
    "lokr, both whole": {"adapter": "lokr", "rank": 9, **KERNELS},
}


def new_unet(base: SDXLBase, dtype: torch.dtype = torch.float32) -> Any:
    return load_part(base, "unet", dtype)


def moved(adapter: Adapter) -> Adapter:
    """As if it had learned something."""
    with torch.no_grad():
        for number, parameter in enumerate(adapter.groups[0].parameters):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return adapter


def predict(unet: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(unet.dtype)

    with torch.no_grad():
        conditions = {"text_embeds": random(1, 16), "time_ids": torch.ones(1, 6, dtype=unet.dtype)}
        return unet(random(1, 4, 8, 8), 10, random(1, 77, 20), added_cond_kwargs=conditions).sample


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_file_merges_into_the_weights_that_peft_merges(kind: str, micro_base: SDXLBase, tmp_path: Path) -> None:
    unet, merged = new_unet(micro_base), new_unet(micro_base)
    plain = {name: weight.clone() for name, weight in merged.state_dict().items()}
    adapter = moved(Adapter(unet, TrainConfig(**{"rank": 3, "alpha": 5.0, **KINDS[kind]})))
    write_lora(tmp_path / "x.safetensors", LoRAFile(unet=adapter.modules()), torch.float32)
    read = read_lora(tmp_path / "x.safetensors")
    report = merge_into(merged, read.unet, 1.0)
    assert read.unknown == report.missing == ()
    assert set(report.applied) == set(adapter.layers)
    for name, layer in adapter.layers.items():
        layer.merge()
        wanted, found = layer.base_layer.weight, merged.get_submodule(name).weight
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()
        assert (found - plain[f"{name}.weight"]).norm() > 1e-3 * wanted.norm()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_starts_at_the_base_in_fp32(kind: str, dtype: torch.dtype, micro_base: SDXLBase) -> None:
    unet = new_unet(micro_base, dtype)
    base = predict(unet)
    adapter = Adapter(unet, TrainConfig(**{"rank": 3, **KINDS[kind]}))
    parameters = [parameter for group in adapter.groups for parameter in group.parameters]
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert len(parameters) == sum(parameter.requires_grad for parameter in unet.parameters())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # bf16 has 3 digits, and rounds wherever the sums are cut
    torch.testing.assert_close(predict(unet), base, atol=tolerance, rtol=tolerance)
    change, rounding = new_unet(micro_base), 1e-6 if dtype == torch.float32 else 2e-3
    merge_into(change, adapter.modules(), 1.0)
    changed = change.state_dict()
    for name, weight in new_unet(micro_base).state_dict().items():
        torch.testing.assert_close(changed[name], weight, atol=rounding, rtol=0)


@pytest.mark.slow
def test_the_lengths_of_a_dora_are_measured_in_fp32(micro_base: SDXLBase) -> None:
    for layer in Adapter(new_unet(micro_base, torch.bfloat16), TrainConfig(adapter="dora")).layers.values():
        lengths = layer.base_layer.weight.float().flatten(1).norm(dim=1)
        torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight.flatten(), lengths, rtol=1e-6, atol=0)


DROPPED: dict[str, dict[str, Any]] = {
    "rank-stabilised dora": {"adapter": "dora", "use_rslora": True, "dropout": 0.2},
    "pissa with ranks and rates of blocks": {
        "blocks": "",
        "init": "pissa",
        "block_ranks": "mid_block=3",
        "block_learning_rates": "up_blocks.0=2",
        "lora_plus_ratio": 4.0,
    },
    "loha": {"adapter": "loha", "rank_dropout": 0.2, "module_dropout": 0.2, **KERNELS},
    "lokr": {"adapter": "lokr", "rank": 1, "rank_dropout": 0.2, "module_dropout": 0.2, **KERNELS},
}


@pytest.mark.parametrize("kind", DROPPED)
def test_a_cancelled_run_continues_to_the_same_bytes(kind: str, run: Train) -> None:
    config = replace(SMALL, **DROPPED[kind])
    state = torch.random.get_rng_state()
    whole = run(config)
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(Cancelled):
        run(config, where="b", on_step=cancel_at(2))
    assert lora_bytes(run(config, where="b")) == lora_bytes(whole)


@pytest.mark.parametrize("kind", ["rank-stabilised dora", "loha", "lokr"])
def test_checkpointing_computes_the_same(kind: str, run: Train) -> None:
    config = replace(SMALL, **DROPPED[kind], steps=2)
    plain = load_file(run(config).lora_path)
    saving = load_file(run(replace(config, gradient_checkpointing="on"), where="b").lora_path)
    for name, tensor in plain.items():
        torch.testing.assert_close(saving[name], tensor, atol=1e-6, rtol=1e-5)


def test_the_file_says_what_it_is(run: Train) -> None:
    for changes, words, module in (
        ({"adapter": "dora"}, "DoRA of 136 modules, rank 2, alpha 4", "lycoris.kohya"),
        ({"adapter": "loha"}, "LoHa of 136 modules, rank 2, alpha 4", "lycoris.kohya"),
        ({"adapter": "lokr", "rank": 1}, "LoKr of 136 modules, rank 1, alpha 4", "lycoris.kohya"),
        ({"init": "pissa"}, "LoRA of 136 modules, rank 4, alpha 8", "networks.lora"),
    ):
        result = run(replace(WHOLE, steps=1, lora_name="it", **changes))
        assert words in describe_lora(result.lora_path)
        metadata = read_lora(result.lora_path).metadata
        assert metadata["ss_network_module"] == module
        assert metadata["ss_network_dim"] == str(result.report.rank)


def test_samples_are_drawn_with_a_lokr(run: Train) -> None:
    settings = {"sample_prompts": ("one",), "sample_steps": 2, "learning_rate": 0.05}
    drawn = [
        run(replace(SMALL, adapter="lokr", rank=1, steps=steps, **settings), where=str(steps)).samples[0]
        for steps in (1, 3)
    ]
    assert (drawn[0] != drawn[1]).any()


def test_a_dora_acts_alike_in_both_forms(run: Train, micro_base: SDXLBase) -> None:
    """The weights on the link are in kohya's form, whatever the file's."""
    dora = replace(SMALL, adapter="dora", steps=2)
    kohya, peft = (run(replace(dora, save_format=form), where=form) for form in ("kohya", "peft"))
    weights = []
    for result in (kohya, peft):
        unet = new_unet(micro_base)
        merge_into(unet, read_lora(result.lora_path).unet, 1.0)
        weights.append(unet.state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-6, rtol=1e-6)
    for name, tensor in kohya.state_dict.items():
        if "dora" in name:
            torch.testing.assert_close(peft.state_dict[name], tensor, atol=1e-6, rtol=1e-6)


def test_loha_and_lokr_have_no_peft_form(micro_base: SDXLBase) -> None:
    modules = Adapter(new_unet(micro_base), TrainConfig(adapter="loha", rank=2)).modules()
    with pytest.raises(ValueError, match="is a LoHa, which diffusers cannot load: save in the kohya format"):
        peft_state_dict(LoRAFile(unet=modules), torch.float32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"hada_w1_a": (4, 2), "hada_w1_b": (3, 4), "hada_w2_a": (4, 2), "hada_w2_b": (2, 4)}, "do not match"),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (2, 3), "lokr_w2_b": (2, 2)}, "do not match"),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (2, 3)}, "no module that this pack can apply"),
    ],
)
def test_damaged_factors_are_named(tensors: dict[str, tuple[int, int]], message: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    key = "lora_unet_input_blocks_4_1_proj_in"
    save_file({f"{key}.{name}": torch.ones(shape) for name, shape in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        read_lora(tmp_path / "x.safetensors")


def test_kernels_factored_once_more_are_merged_as_peft_does() -> None:
    """Files of other trainers hold them; peft makes them with use_effective_conv2d."""
    from peft import LoHaConfig, LoKrConfig, inject_adapter_in_model

    from sdxl_lora_core.lora.modules import LoHaModule, LoKrModule
    from sdxl_lora_core.training.model.adapters import _factors

    for config, kind in ((LoHaConfig, LoHaModule), (LoKrConfig, LoKrModule)):
        settings = config(r=2, alpha=3, target_modules=["0"], use_effective_conv2d=True, init_weights=False)
        model = torch.nn.Sequential(torch.nn.Conv2d(32, 48, 3))
        plain = torch.nn.Sequential(torch.nn.Conv2d(32, 48, 3))
        plain.load_state_dict(model.state_dict())
        layer: Any = inject_adapter_in_model(settings, model)[0]
        module = kind(_factors(layer, {weight: weight.detach() for weight in layer.parameters()}), 3.0)
        assert any(name.endswith(("t1", "t2")) for name in module.factors)
        layer.merge()
        merge_into(plain, {"0": module}, 1.0)
        torch.testing.assert_close(plain[0].weight, layer.base_layer.weight, atol=1e-6, rtol=1e-6)
