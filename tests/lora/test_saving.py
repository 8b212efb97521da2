"""Saved and merged files, and bases with LoRAs in their weights: judged by the weights that they give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sdxl_lora_core.lora.config import MergeLoRAsConfig, SaveBaseConfig, SaveLoRAConfig
from sdxl_lora_core.lora.files import lora_of_state_dict, read_lora, write_lora
from sdxl_lora_core.lora.merge_into_weights import merge_into
from sdxl_lora_core.lora.merged_base import save_merged_base
from sdxl_lora_core.lora.modules import LoRAFile
from sdxl_lora_core.lora.saving import merge_loras, save_lora
from sdxl_lora_core.lora.stack import LoRARef, StackEntry, entry_in_memory, open_stack
from sdxl_lora_core.lora.stacked_part import StackedPart
from sdxl_lora_core.lora.writing import kohya_state_dict
from sdxl_lora_core.sdxl.base import SDXLBase, load_part, load_tokenizers, open_base, scheduler_config
from tests.micro.loras import CONV, UNET_MODULES, Q, load_parts, random_lora, some_modules
from tests.micro.published import published_openclip, published_unet, published_vae

PARTS: tuple[Any, ...] = ("unet", "text_encoder", "text_encoder_2")
PRECISIONS = {"fp16": 2e-3, "bf16": 2e-2, "fp32": 1e-5}  # the largest error, as a share of the largest change


@pytest.fixture(scope="module")
def parts(micro_base: SDXLBase) -> dict[str, Any]:
    return load_parts(micro_base)


@pytest.fixture(scope="module")
def files(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("loras")
    first = some_modules(parts)
    first.tokens = {"ohwx": {"text_encoder": torch.ones(2, 8), "text_encoder_2": torch.ones(2, 12)}}
    common = {"ss_sd_model_name": "micro", "lora_adapter_metadata": json.dumps({"unet.lora_alpha": 99})}
    first.metadata = {
        **common,
        "ss_seed": "1",
        "modelspec.trigger_phrase": "8bit",
        "ss_tag_frequency": '{"a": {"x": 2}}',
    }
    second = LoRAFile(unet={**random_lora(parts["unet"], UNET_MODULES[:3], rank=2)})
    second.metadata = {
        **common,
        "ss_seed": "2",
        "modelspec.trigger_phrase": "ohwx",
        "ss_tag_frequency": '{"a": {"y": 1}}',
    }
    paths = [folder / "first.safetensors", folder / "second.safetensors"]
    for path, file in zip(paths, (first, second), strict=True):
        write_lora(path, file, torch.float32)
    return paths


def stack(files: list[Path], *strengths: float) -> tuple[StackEntry, ...]:
    pairs = zip(files, strengths, strict=False)
    return open_stack([LoRARef(path, f"sub/{path.name}", value, value / 2) for path, value in pairs], None)


def free(_: str) -> bool:
    return False


def worst(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a.float() - b.float()).abs().max()) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("format", ["kohya", "peft", "comfyui"])
def test_a_saved_stack_acts_as_the_stack(
    format: Any, precision: Any, micro_base: SDXLBase, files: list[Path], tmp_path: Path
) -> None:
    entries = stack(files, 0.7, -0.4)
    config = SaveLoRAConfig(lora_name="both", format=format, precision=precision)
    path = save_lora(entries, config, tmp_path, free)
    saved = read_lora(path)
    assert saved.unknown == () and saved.tokens.keys() == {"ohwx"}
    for part in PARTS:
        ours = load_part(micro_base, part, torch.float32)
        merge_into(ours, saved.parts()[part], 1.0)
        effect = worst(ours, load_part(micro_base, part, torch.float32))
        error = worst(ours, StackedPart(micro_base, part, torch.float32, entries).load().module)
        assert error <= PRECISIONS[precision] * effect


def test_a_lora_on_a_wire_is_saved_whole(parts: dict[str, Any], files: list[Path], tmp_path: Path) -> None:
    wire = kohya_state_dict(LoRAFile(unet=read_lora(files[1]).unet), torch.float32)
    source = entry_in_memory("lora", lora_of_state_dict("lora", wire))
    path = save_lora([source], SaveLoRAConfig(precision="fp32"), tmp_path, free)
    assert {key: value for key, value in load_file(path).items()}.keys() == wire.keys()
    with pytest.raises(ValueError, match="lora is a Flux"):
        lora_of_state_dict("lora", {"lora_unet_double_blocks_0_x.lora_down.weight": torch.ones(1, 2)})


def test_nothing_is_overwritten_and_equal_content_is_found_again(files: list[Path], tmp_path: Path) -> None:
    def save(*strengths: float, taken: Any = free) -> str:
        path = save_lora(stack(files, *strengths), SaveLoRAConfig(lora_name="x"), tmp_path, taken)
        return path.name

    assert save(1.0) == save(1.0) == "x.safetensors"
    before = (tmp_path / "x.safetensors").read_bytes()
    assert save(1.0, 0.5) == "x_00002.safetensors"
    assert save(0.5, taken=lambda name: name == "x_00003.safetensors") == "x_00004.safetensors"
    assert (tmp_path / "x.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "x.safetensors",
        "x_00002.safetensors",
        "x_00004.safetensors",
    ]
    with pytest.raises(ValueError, match="neither is empty nor begins or ends with a dot"):
        save_lora(stack(files, 1.0), SaveLoRAConfig(lora_name="../x"), tmp_path, free)


def test_metadata_is_kept_and_extended(files: list[Path], tmp_path: Path) -> None:
    one = save_lora(stack(files, 0.5), SaveLoRAConfig(lora_name="one", rank=2), tmp_path, free)
    metadata = read_lora(one).metadata
    assert metadata.items() >= {
        ("ss_seed", "1"),
        ("ss_sd_model_name", "micro"),
        ("modelspec.trigger_phrase", "8bit"),
        ("ss_tag_frequency", '{"a": {"x": 2}}'),
        ("modelspec.title", "one"),
        ("modelspec.merged_from", "first"),
        ("ss_network_dim", "2"),
        ("ss_network_alpha", "2.0"),
    }
    assert "lora_adapter_metadata" not in metadata  # its alpha is another one now
    recipe = json.loads(metadata["sdxl_lora.recipe"])
    assert (recipe["rank"], recipe["loras"][0][1:]) == (2, [0.5, 0.25])
    both = merge_loras(stack(files, 1, 1), MergeLoRAsConfig(method="svd", rank=2), tmp_path, free)
    metadata = read_lora(both).metadata
    assert "ss_seed" not in metadata and metadata["ss_sd_model_name"] == "micro"
    assert metadata["modelspec.trigger_phrase"] == "8bit, ohwx"
    assert json.loads(metadata["ss_tag_frequency"]) == {"a": {"x": 2, "y": 1}}
    assert metadata["modelspec.merged_from"] == "first, second"
    assert str(tmp_path) not in json.dumps(metadata)


def test_merging_reports_every_module_and_can_be_cancelled(files: list[Path], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def watch(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_loras(stack(files, 1, 1), MergeLoRAsConfig(method="ties", rank=2), tmp_path, free, watch)
    assert seen == [(0, 9), (1, 9), (2, 9), (3, 9)] and not list(tmp_path.iterdir())


def test_an_empty_stack_is_refused(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lora_stack has no LoRA with a strength"):
        merge_loras([], MergeLoRAsConfig(), tmp_path, free)


# ------------------------------------------------------------------ bases


@pytest.mark.slow
@pytest.mark.parametrize("source", ["diffusers", "single_file"])
@pytest.mark.parametrize("layout", ["diffusers", "single_file"])
def test_a_merged_base_has_the_weights_of_base_and_stack(
    layout: Any,
    source: str,
    micro_base: SDXLBase,
    micro_checkpoint: Path,
    micro_sdxl: Path,
    files: list[Path],
    tmp_path: Path,
) -> None:
    base = micro_base if source == "diffusers" else open_base(micro_checkpoint, "fp32", configs=micro_sdxl)
    entries = stack(files, 0.7, -0.4)
    config = SaveBaseConfig(base_name="new", layout=layout, precision="bf16")
    path, fit = save_merged_base(base, entries, config, tmp_path, free)
    assert path.name == ("new" if layout == "diffusers" else "new.safetensors")
    assert "LoRA sub/first.safetensors: 5 of 5 unet modules are in this base" in fit
    new = open_base(path, "fp32", configs=micro_sdxl)
    for part in (*PARTS, "vae"):
        wanted = StackedPart(base, part, torch.bfloat16, entries).load().module.state_dict()
        found = load_part(new, part, torch.bfloat16).state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert load_tokenizers(new)[1].pad_token == load_tokenizers(base)[1].pad_token
    again, _ = save_merged_base(base, stack(files, 0.1), config, tmp_path, free)
    assert again.name.startswith("new_00002")


def test_a_checkpoint_has_the_published_names(
    micro_base: SDXLBase, micro_tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path, _ = save_merged_base(micro_base, (), SaveBaseConfig(precision="fp32"), tmp_path, free)
    written = load_file(path)
    assert written.pop("conditioner.embedders.1.model.logit_scale").shape == ()
    assert written.keys() == micro_tensors.keys()
    assert all(torch.equal(written[name], micro_tensors[name]) for name in written)


@pytest.mark.parametrize("layout", ["diffusers", "single_file"])
def test_a_merged_base_predicts_what_its_base_does(
    layout: Any, micro_sdxl: Path, files: list[Path], tmp_path: Path
) -> None:
    base = open_base(micro_sdxl, "fp32", prediction="v_prediction", zero_terminal_snr="on")
    path, _ = save_merged_base(base, stack(files, 1.0), SaveBaseConfig(layout=layout), tmp_path, free)
    new = open_base(path, "fp32", configs=micro_sdxl)
    assert (new.prediction_type, new.zero_terminal_snr) == ("v_prediction", True)
    assert scheduler_config(new)["rescale_betas_zero_snr"] is True


def test_values_too_large_for_fp16_are_not_written(parts: dict[str, Any], micro_base: SDXLBase, tmp_path: Path) -> None:
    file = LoRAFile(unet={**random_lora(parts["unet"], (Q, CONV), alpha=1e7)})
    write_lora(tmp_path / "big.safetensors", file, torch.float32)
    entries = stack([tmp_path / "big.safetensors"], 1.0)
    with pytest.raises(ValueError, match="of the unet would be infinite in fp16: choose precision bf16 or fp32"):
        save_merged_base(micro_base, entries, SaveBaseConfig(), tmp_path / "out", free)
    assert not list((tmp_path / "out").glob("*"))


def test_the_names_are_those_of_the_tests(micro_base: SDXLBase) -> None:
    """Both lists of names were written on their own."""
    from sdxl_lora_core.sdxl.checkpoint_names import published_names

    for part, by_hand in (("unet", published_unet), ("vae", published_vae), ("text_encoder_2", published_openclip)):
        state = load_part(micro_base, part, torch.float32).state_dict()  # type: ignore[arg-type]
        extra = {"conditioner.embedders.1.model.logit_scale"} if part == "text_encoder_2" else set()
        assert published_names(part, state).keys() == by_hand(state).keys() | extra  # type: ignore[arg-type]


# ------------------------------------------------------------------ nodes


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDXL_LORA_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_the_nodes_chain(home: Path, files: list[Path], micro_base: SDXLBase) -> None:
    from tools.run_workflow import load_pack

    nodes = load_pack().NODE_CLASS_MAPPINGS
    (home / "models/loras").mkdir(parents=True)
    for path in files:
        (home / "models/loras" / path.name).write_bytes(path.read_bytes())
    stack = [(path.name, 0.5, 0.5) for path in files]
    merged, name, wire, report = nodes["MergeLoRAs"]().merge(stack, method="svd", rank=2)["result"]
    assert (merged, name) == ([("merged_lora.safetensors", 1.0, 1.0)], "merged_lora.safetensors")
    assert "rank 2" in report
    save = nodes["SaveSDXLLoRA"]().save
    saved, name, _ = save(lora_stack=merged, lora_name="sub/x", format="peft", precision="bf16")["result"]
    assert (home / "loras/sub/x.safetensors").is_file() and saved == [("sub/x.safetensors", 1.0, 1.0)] == [(name, 1, 1)]
    assert (save(lora=wire, lora_name="y")["result"])[1] == "y.safetensors"
    with pytest.raises(ValueError, match="connect either lora_stack or lora"):
        save()
    made, name, report = nodes["SaveMergedBase"]().save(micro_base, saved, layout="diffusers")["result"]
    assert made.path == home / "diffusers/my_model" and name == "my_model"
    assert "new token ohwx stays in its LoRA" in report
    again = nodes["SaveMergedBase"]().save(micro_base, saved, layout="diffusers")["result"][1]
    assert again == "my_model_00002"


def test_a_base_of_another_size_is_not_saved_as_a_single_file_that_nobody_can_read(
    micro_base: SDXLBase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SDXL_LORA_HOME", str(tmp_path))
    from tools.run_workflow import load_pack

    node: Any = load_pack().NODE_CLASS_MAPPINGS["SaveMergedBase"]()
    with pytest.raises(ValueError, match=r"layout is single_file, but micro-sdxl has .* set layout to diffusers"):
        node.save(micro_base, [], layout="single_file")
    assert not list(tmp_path.rglob("*.safetensors"))
