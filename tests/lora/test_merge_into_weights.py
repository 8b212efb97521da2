"""Merging LoRAs into weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sdxl_lora_core.lora.describe import describe_lora
from sdxl_lora_core.lora.files import read_lora, write_lora
from sdxl_lora_core.lora.merge_into_weights import merge_into, merge_stack
from sdxl_lora_core.lora.modules import LoRAFile, LoRAModule, with_dora_scale, with_magnitude
from sdxl_lora_core.lora.writing import kohya_state_dict, peft_state_dict
from sdxl_lora_core.sdxl.base import SDXLBase
from tests.micro.loras import CONV, OUT, SHORTCUT, UNET_MODULES, Q, change, load_parts, same_effect, some_modules


@pytest.fixture
def parts(micro_base: SDXLBase) -> dict[str, Any]:
    return load_parts(micro_base)


@pytest.fixture
def lora(parts: dict[str, Any]) -> LoRAFile:
    return some_modules(parts)


def test_a_merge_adds_the_scaled_product_in_place(parts: dict[str, Any], lora: LoRAFile) -> None:
    unet = parts["unet"]
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    report = merge_into(unet, lora.unet, 0.5)
    assert (set(report.applied), report.missing) == (set(UNET_MODULES), ())
    for name, value in unet.state_dict().items():
        module = lora.unet.get(name.removesuffix(".weight"))
        expected = before[name] if module is None else before[name] + 0.5 * change(module).reshape(value.shape)
        assert torch.equal(value, expected)


def test_merged_convolutions_act_as_down_then_up(parts: dict[str, Any], lora: LoRAFile) -> None:
    for name in (CONV, SHORTCUT):
        layer, module = parts["unet"].get_submodule(name), lora.unet[name]
        x = torch.randn(1, layer.in_channels, 6, 6)
        side = nn.functional.conv2d(nn.functional.conv2d(x, module.down, padding=layer.padding), module.up)
        expected = layer(x) + 2.0 * side * module.alpha / module.rank
        merge_into(parts["unet"], {name: module}, 2.0)
        assert torch.allclose(layer(x), expected, atol=1e-5)


def test_modules_the_model_lacks_are_reported(parts: dict[str, Any]) -> None:
    module = LoRAModule(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    report = merge_into(parts["unet"], {"down_blocks.7.nothing": module, "mid_block": module}, 1.0)
    assert report.applied == ()
    assert report.missing == ("down_blocks.7.nothing", "mid_block")


def test_a_shape_that_does_not_fit_changes_nothing(parts: dict[str, Any], lora: LoRAFile) -> None:
    before = {name: value.clone() for name, value in parts["unet"].state_dict().items()}
    wrong = {**lora.unet, OUT: LoRAModule(torch.ones(2, 640), torch.ones(640, 2), 1.0)}
    with pytest.raises(ValueError, match=rf"{OUT} changes a weight of shape \[640, 640\], the model's has \[16, 16\]"):
        merge_into(parts["unet"], wrong, 1.0)
    assert all(torch.equal(value, before[name]) for name, value in parts["unet"].state_dict().items())


def test_a_stack_is_rounded_once() -> None:
    layer = nn.Sequential(nn.Linear(1, 1, bias=False)).to(torch.bfloat16)
    layer[0].weight.data.fill_(1.0)
    tiny = {"0": LoRAModule(torch.full((1, 1), 2.0**-8), torch.ones(1, 1), 1.0)}  # half of what bf16 can add to 1
    merge_stack(layer, [(tiny, lambda _: 1.0), (tiny, lambda _: 1.0)])
    assert layer[0].weight.item() == 1 + 2.0**-7
    one_by_one = nn.Sequential(nn.Linear(1, 1, bias=False)).to(torch.bfloat16)
    one_by_one[0].weight.data.fill_(1.0)
    merge_into(one_by_one, tiny, 1.0)
    merge_into(one_by_one, tiny, 1.0)
    assert one_by_one[0].weight.item() == 1.0


def test_dora_is_merged_as_peft_merges_it() -> None:
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(nn.Linear(6, 5), nn.Conv2d(4, 3, 3))
    plain = nn.Sequential(nn.Linear(6, 5), nn.Conv2d(4, 3, 3))
    plain.load_state_dict(model.state_dict())
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["0", "1"]))  # type: ignore[arg-type]
    state = {name: nn.init.normal_(value.data) for name, value in adapted.named_parameters() if "lora_" in name}
    modules = {}
    for name in ("0", "1"):
        pick = {
            role: value for key, value in state.items() for role in ("A", "B") if f"model.{name}.lora_{role}" in key
        }
        (lengths,) = (value for key, value in state.items() if f"model.{name}.lora_magnitude" in key)
        wanted = lengths.reshape(-1, *[1] * (pick["A"].dim() - 1))
        modules[name] = LoRAModule(pick["A"], pick["B"], 3.0, magnitude=wanted)
    expected: Any = adapted.merge_and_unload()
    merge_into(plain, modules, 1.0)
    for name in (0, 1):
        assert torch.allclose(plain[name].weight, expected[name].weight, atol=1e-6)


def random_dora(lengths: str) -> dict[str, LoRAModule]:
    linear, kernel = ((5, 1), (5, 1, 1, 1))
    return {
        Q: LoRAModule(torch.randn(2, 6), torch.randn(5, 2), 1.0, **{lengths: torch.rand(linear) + 0.5}),
        CONV: LoRAModule(torch.randn(2, 6, 3, 3), torch.randn(5, 2, 1, 1), 2.0, **{lengths: torch.rand(kernel) + 0.5}),
    }


@pytest.mark.parametrize(("format", "lengths"), [("kohya", "dora_scale"), ("peft", "magnitude")])
def test_dora_survives_each_format(format: Any, lengths: str, tmp_path: Path) -> None:
    file = LoRAFile(unet={**random_dora(lengths)})
    write_lora(tmp_path / "x.safetensors", file, torch.float32, format)
    read = read_lora(tmp_path / "x.safetensors")
    assert same_effect(read.unet, file.unet)  # type: ignore[arg-type]
    for name in (Q, CONV):
        assert torch.equal(getattr(read.unet[name], lengths), getattr(file.unet[name], lengths))
    assert "DoRA of 2 modules" in describe_lora(tmp_path / "x.safetensors")


def test_a_dora_in_the_other_form_is_refused() -> None:
    with pytest.raises(ValueError, match="a DoRA in kohya's form.*: save it as kohya"):
        peft_state_dict(LoRAFile(unet={**random_dora("dora_scale")}), torch.float32)
    with pytest.raises(ValueError, match="a DoRA in peft's form.*: save it as peft"):
        kohya_state_dict(LoRAFile(unet={**random_dora("magnitude")}), torch.float32)


def test_both_forms_of_a_dora_change_a_weight_alike() -> None:
    for name, layer in ((Q, nn.Linear(6, 5)), (CONV, nn.Conv2d(6, 5, 3))):
        peft = random_dora("magnitude")[name]
        kohya = with_dora_scale(peft, layer.weight)
        assert kohya.magnitude is None and not torch.allclose(kohya.dora_scale, peft.magnitude)  # type: ignore[arg-type]
        back = with_magnitude(kohya, layer.weight)
        torch.testing.assert_close(back.magnitude, peft.magnitude)
        weights = []
        for module in (peft, kohya, back):
            model = nn.Sequential(layer.__class__(6, 5, *([3] if name == CONV else [])))
            model[0].load_state_dict(layer.state_dict())
            merge_into(model, {"0": module}, 0.7)
            weights.append(model[0].weight)
        torch.testing.assert_close(weights[1], weights[0])
        torch.testing.assert_close(weights[2], weights[0])


def test_dora_over_inputs_brings_the_columns_to_its_lengths() -> None:
    over_inputs = torch.rand(1, 6) + 0.5
    layer = nn.Sequential(nn.Linear(6, 5, bias=False))
    merge_into(layer, {"0": LoRAModule(torch.randn(2, 6), torch.randn(5, 2), 1.0, over_inputs)}, 1.0)
    assert torch.allclose(layer[0].weight.norm(dim=0), over_inputs[0], atol=1e-6)
