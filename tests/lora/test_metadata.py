"""Metadata of LoRA files, this pack's and others'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdxl_lora_core.lora import metadata
from sdxl_lora_core.lora.describe import describe_lora
from sdxl_lora_core.lora.dialects import Place, peft_alpha
from sdxl_lora_core.lora.files import read_lora, write_lora
from sdxl_lora_core.lora.modules import LoRAFile, LoRAModule
from sdxl_lora_core.safetensors_file import pack_weights, read_header, write_weights

KEY = "lora_unet_mid_block_attentions_0_proj_in"
PLACE = Place("unet", "mid_block.attentions.0.proj_in")


def write(path: Path, texts: dict[str, str]) -> Path:
    tensors = {f"{KEY}.lora_down.weight": torch.ones(2, 4), f"{KEY}.lora_up.weight": torch.ones(4, 2)}
    save_file(tensors, path, texts)
    return path


@pytest.mark.parametrize(
    ("tags", "counts"),
    [
        ({"a": {"cat": 2, "dog": "3"}}, {"a": {"cat": 2, "dog": 3}}),
        ({"a": {"cat": None, "dog": "1.5", "red": -1, "blue": True, "one": 1}}, {"a": {"one": 1}}),
        ({"a": {"cat": {"nested": 1}, "dog": [1]}}, {"a": {}}),
        ({"a": None, "b": [1]}, {}),
        ([1], {}),
    ],
)
def test_odd_tag_counts_are_left_out(tmp_path: Path, tags: Any, counts: dict[str, dict[str, int]]) -> None:
    assert metadata.read_tag_counts({"ss_tag_frequency": json.dumps(tags)}) == counts
    assert "modules" in describe_lora(write(tmp_path / "x.safetensors", {"ss_tag_frequency": json.dumps(tags)}))


@pytest.mark.parametrize("text", ["{", '{"a": {"cat": NaN, "dog": 1e999}}', "[" * 100_000])
def test_tag_counts_that_are_not_json_are_none(tmp_path: Path, text: str) -> None:
    found = metadata.read_tag_counts({"ss_tag_frequency": text})
    assert not any(found.values())
    assert "modules" in describe_lora(write(tmp_path / "x.safetensors", {"ss_tag_frequency": text}))


@pytest.mark.parametrize("pattern", [["a"], "a", {"(": 4}, {"proj_in": "four"}, {"proj_in": None}, None])
def test_odd_alpha_patterns_of_peft_apply_to_no_module(tmp_path: Path, pattern: Any) -> None:
    settings = {"lora_alpha": 8, "alpha_pattern": pattern}
    assert peft_alpha(settings, PLACE, rank=2) == 8.0
    assert peft_alpha({**settings, "alpha_pattern": {"proj_in": 3}}, PLACE, rank=2) == 3.0
    tensors = {
        f"unet.{PLACE.module}.lora_A.weight": torch.ones(2, 4),
        f"unet.{PLACE.module}.lora_B.weight": torch.ones(4, 2),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    assert read_lora(tmp_path / "x.safetensors").unet[PLACE.module].alpha == 8.0


def test_a_long_tag_table_keeps_the_most_frequent(monkeypatch: pytest.MonkeyPatch) -> None:
    captions = [f"common, tag {number}" for number in range(100)] + ["tag 7"]
    assert len(metadata.tag_counts(captions)) == 101
    monkeypatch.setattr(metadata, "TAG_BYTES", 30)
    assert metadata.tag_counts(captions) == {"common": 100, "tag 7": 2, "tag 0": 1, "tag 1": 1, "tag 10": 1}


def test_a_header_that_no_program_reads_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        write_weights(path, pack_weights({"a": torch.ones(2)}), {"much": "x" * 101_000_000})
    assert list(tmp_path.iterdir()) == []
    file = LoRAFile(unet={PLACE.module: LoRAModule(torch.ones(2, 4), torch.ones(4, 2), 2.0)}, metadata={"some": "x"})
    write_lora(path, file, torch.float32)
    assert read_header(path).metadata["some"] == "x"


@pytest.mark.parametrize(
    "key",
    [
        f"unet.{PLACE.module}.lora_A.my-adapter.weight",
        f"unet.{PLACE.module}.lora_A.v1.2.weight",
        f"unet._orig_mod.{PLACE.module}.lora_A.weight",
        f"module.unet.{PLACE.module}.lora_A.weight",
        f"base_model.model._orig_mod.{PLACE.module}.lora_A.default.weight",
        f"_orig_mod.base_model.model.{PLACE.module}.lora_A.weight",
    ],
)
def test_keys_of_compiled_and_wrapped_models_are_read(tmp_path: Path, key: str) -> None:
    tensors = {key: torch.ones(2, 4), key.replace("lora_A", "lora_B"): torch.ones(4, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    file = read_lora(tmp_path / "x.safetensors")
    assert list(file.unet) == [PLACE.module] and file.unknown == ()


@pytest.mark.parametrize("alpha", [8, "8", 8.0])
def test_an_alpha_of_peft_may_be_a_text(alpha: Any) -> None:
    assert peft_alpha({"lora_alpha": alpha, "r": {"no": "rank"}, "x.y.alpha": "z"}, PLACE, rank=2) == 8.0


@pytest.mark.parametrize("alpha", ["eight", [8], {"a": 8}, "nan", 1e999])
def test_an_alpha_of_peft_that_is_no_number_is_named(alpha: Any) -> None:
    with pytest.raises(ValueError, match=r"unet.mid_block.attentions.0.proj_in has alpha .* which is not a number"):
        peft_alpha({"lora_alpha": alpha}, PLACE, rank=2)
