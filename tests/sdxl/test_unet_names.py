"""The two names of the UNet's modules."""

from __future__ import annotations

from typing import Any

import pytest

from sdxl_lora_core.sdxl.unet_names import diffusers_block_name, dotted, sai_block_name
from tests.micro.loras import ATTENTION, OUT, Q


def test_every_module_of_sdxl_has_its_own_sai_name_and_comes_back(empty_sdxl: dict[str, Any]) -> None:
    modules = {name.rpartition(".")[0] for name, _ in empty_sdxl["unet"].named_parameters()}
    attention = [name for name in modules if name.endswith(ATTENTION) and ".attn" in name]
    assert len(attention) == 560
    names = {module: sai_block_name(module) for module in modules}
    assert len(set(names.values())) == len(modules)
    for module, name in names.items():
        assert diffusers_block_name(name) == module
        assert dotted(name.replace(".", "_")) == name
        assert dotted(module.replace(".", "_")) == module


@pytest.mark.parametrize(
    ("diffusers", "sai"),
    [
        (Q, "input_blocks.4.1.transformer_blocks.0.attn1.to_q"),
        ("down_blocks.2.attentions.1.proj_in", "input_blocks.8.1.proj_in"),
        (OUT, "middle_block.1.transformer_blocks.1.attn2.to_out.0"),
        ("up_blocks.0.attentions.2.transformer_blocks.9.ff.net.2", "output_blocks.2.1.transformer_blocks.9.ff.net.2"),
        ("up_blocks.1.attentions.0.proj_out", "output_blocks.3.1.proj_out"),
        ("down_blocks.0.resnets.1.time_emb_proj", "input_blocks.2.0.emb_layers.1"),
        ("down_blocks.1.downsamplers.0.conv", "input_blocks.6.0.op"),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
        ("up_blocks.2.resnets.2.conv_shortcut", "output_blocks.8.0.skip_connection"),
        ("mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
        ("conv_in", "input_blocks.0.0"),
        ("add_embedding.linear_2", "label_emb.0.2"),
    ],
)
def test_known_names(diffusers: str, sai: str) -> None:
    assert sai_block_name(diffusers) == sai
    assert diffusers_block_name(sai) == diffusers


def test_names_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="transformer.blocks.0 is not a module of SDXL's UNet"):
        sai_block_name("transformer.blocks.0")
    assert diffusers_block_name("output_blocks.4.7.x") is None
    assert diffusers_block_name("joint_blocks.4.1.x") is None
