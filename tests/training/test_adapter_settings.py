"""The settings of an adapter: that each takes effect, and what cannot go together."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdxl_lora_core.lora.files import read_lora, write_lora
from sdxl_lora_core.lora.modules import LoRAFile
from sdxl_lora_core.sdxl.base import CONFIGS, SDXLBase, load_part, open_base
from sdxl_lora_core.sdxl.blocks import BLOCKS, read_block_values, value_for
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.model.adapters import Adapter
from sdxl_lora_core.training.run.runs import run_fingerprint
from tests.micro.loras import TEXT, load_parts, random_lora
from tests.micro.runs import SMALL, WHOLE, Cancelled, Train, Trained, cancel_at, load, lora_bytes, trainable
from tools.run_workflow import ROOT, load_pack

STYLE = "up_blocks.0.attentions.1"


@pytest.fixture
def adapter(micro_base: SDXLBase) -> Any:
    def make(**settings: Any) -> Adapter:
        config = TrainConfig(**settings)
        start = read_lora(Path(config.continue_from)) if config.continue_from else None
        return Adapter(load_part(micro_base, "unet", torch.float32), config, "unet", start)

    return make


def full_size_unet() -> Any:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        config = UNet2DConditionModel.load_config(str(CONFIGS), subfolder="unet")
        return UNet2DConditionModel.from_config(config)


# ------------------------------------------------------------------ what each does


def test_a_rank_stabilised_lora_is_divided_by_the_root_of_its_rank(adapter: Any) -> None:
    stabilised = adapter(rank=4, alpha=6.0, use_rslora=True)
    assert {layer.scaling["default"] for layer in stabilised.layers.values()} == {6 / math.sqrt(4)}
    modules = stabilised.modules().values()
    assert {(module.alpha, module.scale) for module in modules} == {(6 * math.sqrt(4), 6 / math.sqrt(4))}


def test_a_gaussian_start_has_a_deviation_of_one_over_the_rank(adapter: Any) -> None:
    modules = adapter(rank=5, init="gaussian").modules().values()
    assert torch.cat([module.down.flatten() for module in modules]).std().item() == pytest.approx(1 / 5, rel=0.03)


def test_pissa_starts_with_the_largest_singular_parts(adapter: Any, micro_base: SDXLBase) -> None:
    base = load_part(micro_base, "unet", torch.float32)
    split = adapter(rank=3, alpha=5.0, init="pissa")
    for name, layer in split.layers.items():
        weight = base.get_submodule(name).weight.detach()
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        rest = weight - product * layer.scaling["default"]
        torch.testing.assert_close(layer.base_layer.weight, rest, atol=1e-5, rtol=0)
        smallest = torch.linalg.svdvals(weight)[3:].norm()  # Eckart and Young: no product of rank 3 leaves less
        assert smallest - 1e-5 <= rest.norm() <= 1.05 * smallest
    assert {module.rank for module in split.modules().values()} == {6}


@pytest.mark.parametrize("setting", ["rank_dropout", "module_dropout"])
def test_dropout_changes_the_training_and_repeats(setting: str, run: Train) -> None:
    config = replace(SMALL, adapter="loha", steps=2)
    dropped = replace(config, **{setting: 0.5})
    first = lora_bytes(run(dropped))
    assert lora_bytes(run(dropped, where="b")) == first
    assert lora_bytes(run(config, where="c")) != first


def test_only_the_named_blocks_learn(adapter: Any) -> None:
    names = adapter(rank=1, blocks=f"{STYLE}, mid_block").layers
    assert {name.split(".transformer")[0] for name in names} == {STYLE, "mid_block.attentions.0"}
    both, outer = (adapter(rank=1, blocks=blocks).layers for blocks in (f"{STYLE}, up_blocks.0", "up_blocks.0"))
    assert both.keys() == outer.keys()


def test_the_blocks_are_those_of_the_full_size_unet() -> None:
    unet = full_size_unet()
    names = {name for name, _ in unet.named_modules()}
    assert set(BLOCKS) <= names
    stages = {".".join(name.split(".")[: 1 if name.startswith("mid") else 2]) for name in names if "_block" in name}
    assert {block for block in BLOCKS if "attentions" not in block} == stages - {"down_blocks", "up_blocks"}
    assert {name for name in names if name.partition("attentions.")[2].isdigit()} == {b for b in BLOCKS if "att" in b}


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "count"), [({"target_modules": "all-linear"}, 722), ({"blocks": STYLE}, 80)])
def test_the_full_size_unet_gets_kohyas_modules(settings: dict[str, Any], count: int) -> None:
    assert len(Adapter(full_size_unet(), TrainConfig(rank=1, **settings)).layers) == count


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_a_blocks_rank_keeps_the_scale(kind: str, adapter: Any) -> None:
    layers = adapter(adapter=kind, rank=2, alpha=5.0, block_ranks=f"up_blocks.0=4, {STYLE}=1").layers
    for name, layer in layers.items():
        rank = 1 if STYLE in name else 4 if name.startswith("up_blocks.0") else 2
        assert (layer.r["default"], layer.scaling["default"]) == (rank, 2.5)


def test_the_first_adam_step_shows_the_rate_of_each_block(run: Train) -> None:
    """From zero it is the learning rate itself, whatever the gradient."""
    config = replace(WHOLE, steps=1, block_learning_rates="mid_block=3, up_blocks.0=0.5", lora_plus_ratio=4.0)
    for name, module in read_lora(run(config).lora_path).unet.items():
        factor = 3.0 if name.startswith("mid") else 0.5 if name.startswith("up_blocks.0") else 1.0
        assert module.factors["lora_up.weight"].abs().max().item() == pytest.approx(4e-3 * factor, rel=1e-3)


@pytest.mark.slow
def test_lora_plus_leaves_the_down_matrices_at_the_plain_rate(adapter: Any) -> None:
    groups = {group.rate_factor: group.parameters for group in adapter(rank=2, lora_plus_ratio=4.0).groups}
    layers = adapter(rank=2).layers.values()
    assert {factor: len(parameters) for factor, parameters in groups.items()} == {1.0: len(layers), 4.0: len(layers)}
    assert all(parameter.shape[0] == 2 for parameter in groups[1.0])
    assert len(adapter(adapter="dora", rank=2, lora_plus_ratio=4.0).groups[0].parameters) == 2 * len(layers)


def test_the_closest_block_decides() -> None:
    values = read_block_values("block_ranks", f"up_blocks.0=4,{STYLE}=8", 1, 1024)
    assert value_for(f"{STYLE}.proj_in", values, 2) == 8
    assert value_for("up_blocks.0.attentions.2.proj_in", values, 2) == 4
    assert value_for("mid_block.attentions.0.proj_in", values, 2) == 2


# ------------------------------------------------------------------ continuing from a file


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_training_starts_where_the_file_ends(kind: str, adapter: Any, tmp_path: Path) -> None:
    first = adapter(adapter=kind, rank=1, alpha=3.0, target_modules="all-linear+conv", seed=1)
    with torch.no_grad():
        for number, parameter in enumerate(first.groups[0].parameters):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    path, learned = tmp_path / "x.safetensors", first.modules()
    write_lora(path, LoRAFile(unet=learned), torch.float32)
    settings = {"adapter": kind, "rank": 1, "target_modules": "all-linear+conv", "continue_from": str(path)}
    for alpha in (3.0, 7.0):
        second = adapter(**settings, alpha=alpha)
        for name, module in second.modules().items():
            wanted = learned[name]
            change, before = (one.change(torch.device("cpu")) * one.scale for one in (module, wanted))
            torch.testing.assert_close(change, before, atol=1e-6, rtol=1e-5)
            if kind == "dora":
                torch.testing.assert_close(module.dora_scale, wanted.dora_scale)
        parameters = [parameter for group in second.groups for parameter in group.parameters]
        assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in parameters)


def test_a_continued_run_is_another_run_and_resumes_exactly(
    run: Train, trained: Trained, tmp_path: Path, micro_base: SDXLBase, pictures: Path
) -> None:
    start = trained(replace(SMALL, steps=2)).lora_path
    config = replace(SMALL, continue_from=str(start))
    whole = run(config, where="b")
    assert lora_bytes(whole) != lora_bytes(trained())
    with pytest.raises(Cancelled):
        run(config, where="d", on_step=cancel_at(2))
    copy = tmp_path / "copy.safetensors"
    shutil.copy(start, copy)
    assert lora_bytes(run(replace(config, continue_from=str(copy)), where="d")) == lora_bytes(whole)

    dataset = load(pictures)
    fingerprint = run_fingerprint(micro_base, dataset, config)
    assert run_fingerprint(micro_base, dataset, replace(config, continue_from=str(copy))) == fingerprint
    copy.write_bytes(trained(replace(SMALL, steps=3)).lora_path.read_bytes())
    assert run_fingerprint(micro_base, dataset, replace(config, continue_from=str(copy))) != fingerprint
    with pytest.raises(FileNotFoundError, match="continue_from is gone.safetensors, which does not exist"):
        run_fingerprint(micro_base, dataset, replace(config, continue_from="gone.safetensors"))


def test_the_node_finds_the_file_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    pack: Any = load_pack()
    configs: list[TrainConfig] = []

    def train(job: Any, context: Any) -> None:
        configs.append(job.config)
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module(f"{pack.__name__}.sdxl_lora_core.training.train"), "train", train)
    node = pack.NODE_CLASS_MAPPINGS["TrainSDXLLoRA"]()
    base, dataset = open_base(ROOT / "assets/tiny-sdxl"), SimpleNamespace(entries=())
    with pytest.raises(KeyboardInterrupt):
        node.train(base, dataset, {"continue_from": "8bit_style (bundled)"}, lora_name="x")
    assert Path(configs[0].continue_from) == ROOT / "assets/loras/8bit_style.safetensors"
    with pytest.raises(FileNotFoundError, match="'nothing' was not found: choose a .safetensors file in the loras"):
        node.train(base, dataset, {"continue_from": "nothing"}, lora_name="x")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 2}, r"has rank 3 for a weight of shape \[16, 16\]; in this run it is 2, for"),
        ({"adapter": "dora"}, "is a lora, and adapter is dora: set adapter to lora"),
        ({"adapter": "lokr"}, "is a lora, and adapter is lokr"),
        ({"target_modules": "all-linear"}, "only this run has .*: choose the target_modules and blocks"),
        ({"blocks": "mid_block"}, "with blocks mid_block has .*; only the file has down_blocks"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    settings: dict[str, Any], message: str, adapter: Any, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    write_lora(path, LoRAFile(unet=adapter(rank=3).modules()), torch.float16)
    with pytest.raises(ValueError, match=f"continue_from is x.safetensors.*{message}"):
        adapter(**{"rank": 3, "continue_from": str(path), **settings})


@pytest.mark.slow
def test_a_file_for_another_base_is_refused(adapter: Any, tmp_path: Path) -> None:
    modules = adapter(adapter="dora", rank=3).modules()
    name, module = next(iter(modules.items()))
    modules[name] = replace(module, down=torch.zeros(3, 640), up=torch.zeros(640, 3), dora_scale=torch.ones(640, 1))
    write_lora(tmp_path / "x.safetensors", LoRAFile(unet=modules), torch.float16)
    with pytest.raises(ValueError, match=r"shape \[640, 640\]; in this run it is 3, for \[16, 16\]: .*or the base"):
        adapter(adapter="dora", rank=3, continue_from=str(tmp_path / "x.safetensors"))


def test_a_file_with_text_encoders_is_refused(adapter: Any, micro_base: SDXLBase, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    text = random_lora(load_parts(micro_base)["text_encoder"], (TEXT,))
    write_lora(path, LoRAFile(unet=adapter(rank=3).modules(), text_encoder=text), torch.float16)
    config = TrainConfig(rank=3, continue_from=str(path))
    with pytest.raises(ValueError, match="changes the text_encoder, and this run does not train it: set text_encoder"):
        trainable(micro_base, config)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_dropout": 0.1}, "rank_dropout is 0.1 and adapter is lora.*: choose adapter loha or lokr"),
        ({"module_dropout": 0.1, "adapter": "dora"}, "module_dropout is 0.1 and adapter is dora"),
        ({"dropout": 0.1, "adapter": "loha"}, "dropout is 0.1 and adapter is loha.*: choose adapter lora or dora"),
        ({"use_rslora": True, "adapter": "lokr"}, "use_rslora is True and adapter is lokr"),
        ({"lora_plus_ratio": 4.0, "adapter": "lokr"}, "lora_plus_ratio is 4.0 and adapter is lokr"),
        ({"init": "pissa", "adapter": "loha"}, "init is pissa and adapter is loha"),
        ({"save_format": "peft", "adapter": "loha"}, "save_format is peft and adapter is loha"),
        ({"init": "pissa", "target_modules": "all-linear+conv"}, "init is pissa and target_modules is all-linear"),
        ({"init": "gaussian", "continue_from": "x"}, "init is gaussian and continue_from is set"),
        ({"blocks": "up_blocks.7"}, "blocks names 'up_blocks.7', which is not a block: use .*mid_block"),
        ({"blocks": "mid_block, mid_block"}, "blocks names mid_block twice"),
        ({"blocks": "down_blocks.0"}, "blocks names down_blocks.0 and target_modules is attention"),
        ({"block_ranks": "mid_block"}, "block_ranks is 'mid_block': write block=number, such as mid_block=4"),
        ({"block_ranks": "mid_block=2.5"}, "block_ranks gives mid_block 2.5: a rank is a whole number"),
        ({"block_ranks": "mid_block=0"}, "block_ranks gives mid_block 0: give a value from 1 to 1024"),
        ({"block_ranks": "mid_block=2", "blocks": "up_blocks.0"}, "names mid_block, which blocks .up_blocks.0"),
        ({"block_learning_rates": "up_blocks.2=2"}, "block_learning_rates names up_blocks.2 and target_modules"),
        ({"block_learning_rates": "mid_block=0"}, "block_learning_rates gives mid_block 0: give a value from 0.001"),
    ],
)
def test_what_cannot_go_together_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_blocks_without_attention_may_learn_with_the_convolutions(adapter: Any) -> None:
    layers = adapter(rank=1, blocks="down_blocks.0", target_modules="all-linear+conv").layers
    assert layers and all(name.startswith("down_blocks.0.") for name in layers)


def test_pissa_of_more_parts_than_a_weight_has_is_refused(adapter: Any) -> None:
    with pytest.raises(ValueError, match="rank is 32 and init is pissa: .* has 16 singular values"):
        adapter(rank=32, init="pissa")
