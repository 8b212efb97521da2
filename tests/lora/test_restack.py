"""A loaded part is given other stacks: same bits as loading it anew, and the base comes back bit by bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdxl_lora_core.lora.files import write_lora
from sdxl_lora_core.lora.modules import DiffModule, LoRAFile, LoRAModule
from sdxl_lora_core.lora.stack import LoRARef, StackEntry, open_stack
from sdxl_lora_core.lora.stacked_part import StackedPart
from sdxl_lora_core.runtime.loaded_parts import Loaded
from sdxl_lora_core.sdxl import weight_reader
from sdxl_lora_core.sdxl.base import SDXLBase, load_part, open_base
from sdxl_lora_core.sdxl.family import ENCODERS, Part
from tests.micro.loras import CONV, OUT, UNET_MODULES, Q, find, load_parts, random_lora

BF16 = torch.bfloat16
TEXT_2 = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
NORM = "down_blocks.1.attentions.0.norm"


@pytest.fixture(scope="module", params=["folder", "single file"])
def base(request: pytest.FixtureRequest, micro_base: SDXLBase, micro_checkpoint: Path, micro_sdxl: Path) -> SDXLBase:
    return micro_base if request.param == "folder" else open_base(micro_checkpoint, "fp32", configs=micro_sdxl)


@pytest.fixture(scope="module")
def files(micro_base: SDXLBase, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Plain LoRAs that share weights and one that is a DoRA on one of them and changes a norm and a bias."""
    folder = tmp_path_factory.mktemp("loras")
    parts = load_parts(micro_base)
    text = ("text_model.encoder.layers.1.self_attn.q_proj",)
    text_2 = tuple(f"text_model.encoder.layers.2.{name}" for name in TEXT_2)
    first = LoRAFile(
        unet=random_lora(parts["unet"], UNET_MODULES),
        text_encoder=random_lora(parts["text_encoder"], text),
        text_encoder_2=random_lora(parts["text_encoder_2"], text_2),
    )
    second = LoRAFile(unet=random_lora(parts["unet"], (Q, CONV), rank=2))
    plain = random_lora(parts["unet"], (Q, OUT), rank=4)
    lengths = torch.rand(len(find(parts["unet"], Q).weight), 1) + 0.5
    norm = find(parts["unet"], NORM)
    third = LoRAFile(
        unet={
            **plain,
            Q: LoRAModule(plain[Q].down, plain[Q].up, 2.0, lengths),
            NORM: DiffModule(torch.randn(norm.weight.shape)),
            f"{NORM}.bias": DiffModule(torch.randn(norm.bias.shape)),
        }
    )
    paths = [folder / f"{number}.safetensors" for number in range(3)]
    for path, file in zip(paths, (first, second, third), strict=True):
        write_lora(path, file, torch.float16)
    return paths


def stack(files: list[Path], *strengths: float, blocks: str = "") -> tuple[StackEntry, ...]:
    pairs = zip(files, strengths, strict=False)
    return open_stack([LoRARef(path, path.stem, strength, strength, blocks) for path, strength in pairs], None)


def bits(module: nn.Module | Loaded) -> Mapping[str, Tensor]:
    weights = module.module if isinstance(module, Loaded) else module
    return {name: tensor.clone() for name, tensor in weights.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def restacked(loaded: Loaded, wanted: StackedPart) -> Loaded:
    """Changed in place, which has to be possible."""
    changed = wanted.restack(loaded)
    assert changed is not None and changed.module is loaded.module
    return changed


STACKS: list[dict[str, Any]] = [
    {"strengths": (1.0,)},
    {"strengths": (1.0, 0.5)},
    {"strengths": (1.0, 0.7)},
    {"strengths": (0.0, 0.7, 1.0)},
    {"strengths": (0.3, 0.7, 1.0)},
    {"strengths": (0.3, 0.7, 1.0), "blocks": "mid_block=0, up_blocks.0=0.5"},
    {"strengths": ()},
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_restacked_part_is_the_part_loaded_anew(base: SDXLBase, files: list[Path], dtype: torch.dtype) -> None:
    bare = bits(load_part(base, "unet", dtype))
    unet = StackedPart(base, "unet", dtype, stack(files, 0.9, 0.0, 0.4)).load()
    for wanted in STACKS:
        entries = stack(files, *wanted["strengths"], blocks=wanted.get("blocks", ""))
        unet = restacked(unet, StackedPart(base, "unet", dtype, entries))
        assert same(bits(unet), bits(StackedPart(base, "unet", dtype, entries).load()))
        assert same(bits(unet), bare) == (not wanted["strengths"])


@pytest.mark.slow
def test_a_weak_change_is_rounded_once(base: SDXLBase, files: list[Path]) -> None:
    """Half of it would be lost on the way if the weight were rounded before it."""
    weak = stack(files, 0.001)
    exact, bare = (bits(StackedPart(base, "unet", torch.float32, entries).load()) for entries in (weak, ()))
    for unet in (StackedPart(base, "unet", BF16, weak).load(), StackedPart(base, "unet", BF16, ()).load()):
        restacked(unet, StackedPart(base, "unet", BF16, weak))
        assert same(bits(unet), {name: weight.to(BF16) for name, weight in exact.items()})
    twice = bare[f"{Q}.weight"].to(BF16).float() + (exact[f"{Q}.weight"] - bare[f"{Q}.weight"])
    assert not torch.equal(twice.to(BF16), exact[f"{Q}.weight"].to(BF16)), "the test would not notice"


def test_only_weights_that_change_are_read_again(
    base: SDXLBase, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    reader = weight_reader.BaseWeights.read  # type: ignore[attr-defined]
    monkeypatch.setattr(weight_reader.BaseWeights, "read", lambda own, name: read.append(name) or reader(own, name))
    unet = StackedPart(base, "unet", BF16, stack(files, 1.0, 1.0)).load()
    unet = restacked(unet, StackedPart(base, "unet", BF16, stack(files, 1.0, 1.0)))
    assert sorted(set(read)) == sorted(UNET_MODULES)
    read.clear()
    unet = restacked(unet, StackedPart(base, "unet", BF16, stack(files, 1.0, 1.0)))
    assert read == []
    unet = restacked(unet, StackedPart(base, "unet", BF16, stack(files, 1.0, 0.5)))
    assert sorted(read) == sorted([Q, CONV])
    read.clear()
    unet = restacked(unet, StackedPart(base, "unet", BF16, stack(files, 1.0, 0.5, blocks="mid_block=0.5")))
    assert read == [name for name in UNET_MODULES if name.startswith("mid_block")]


@pytest.mark.parametrize("part", ENCODERS)
def test_encoders_are_restacked_as_well(base: SDXLBase, files: list[Path], part: Part) -> None:
    bare = bits(load_part(base, part, BF16))
    encoder = StackedPart(base, part, BF16, stack(files, 1.0)).load()
    for strengths in ((0.5,), ()):
        encoder = restacked(encoder, StackedPart(base, part, BF16, stack(files, *strengths)))
        assert same(bits(encoder), bits(StackedPart(base, part, BF16, stack(files, *strengths)).load()))
    assert same(bits(encoder), bare)


def test_a_transposed_matrix_is_loaded_anew(
    micro_base: SDXLBase, micro_checkpoint: Path, micro_sdxl: Path, tmp_path: Path
) -> None:
    name = "text_projection"
    file = LoRAFile(text_encoder_2=random_lora(load_parts(micro_base)["text_encoder_2"], (name,)))
    write_lora(tmp_path / "projection.safetensors", file, torch.float16)
    for base, possible in ((micro_base, True), (open_base(micro_checkpoint, configs=micro_sdxl), False)):
        encoder = StackedPart(base, "text_encoder_2", BF16, ()).load()
        entries = stack([tmp_path / "projection.safetensors"], 1.0)
        assert bool(StackedPart(base, "text_encoder_2", BF16, entries).restack(encoder)) is possible


def test_another_base_or_precision_is_loaded_anew(base: SDXLBase, files: list[Path]) -> None:
    entries = stack(files, 1.0)
    unet = StackedPart(base, "unet", BF16, entries).load()
    assert not StackedPart(base, "unet", torch.float32, entries).restack(unet)
    assert not StackedPart(base, "unet", BF16, entries).restack(Loaded(load_part(base, "unet", BF16)))


def test_strengths_by_block_multiply_the_strength_there(micro_base: SDXLBase, files: list[Path]) -> None:
    def unet(*strengths: float, blocks: str = "") -> Mapping[str, Tensor]:
        return bits(StackedPart(micro_base, "unet", torch.float32, stack(files, *strengths, blocks=blocks)).load())

    bare, whole, half = unet(), unet(1.0), unet(0.5)
    mixed = unet(1.0, blocks="up_blocks.0=0.5, mid_block=0")
    for name in whole:
        wanted = bare if name.startswith("mid_block") else half if name.startswith("up_blocks.0") else whole
        assert torch.equal(mixed[name], wanted[name]), name


def test_an_unknown_block_is_named_before_anything_is_read(files: list[Path]) -> None:
    with pytest.raises(ValueError, match="LoRA 0: blocks names 'middle', which is not a block"):
        stack(files, 1.0, blocks="middle=0")


def test_what_fits_is_told(micro_base: SDXLBase, files: list[Path]) -> None:
    unet = StackedPart(micro_base, "unet", BF16, stack(files, 1.0, 0.5)).load()
    assert unet.state.fit == (
        "LoRA 0: 5 of 5 unet modules are in this base",
        "LoRA 1: 2 of 2 unet modules are in this base",
    )
