"""Several LoRAs as one and LoRAs of smaller rank: by their effect on weights, and against peft."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdxl_lora_core.lora.merge_into_weights import merge_into, merge_stack
from sdxl_lora_core.lora.merge_loras import Reduction, combine, resize, single
from sdxl_lora_core.lora.modules import DiffModule, LoHaModule, LoKrModule, LoRAFile, LoRAModule
from sdxl_lora_core.lora.stack import LoRARef, StackEntry
from sdxl_lora_core.sdxl.base import SDXLBase, load_part
from tests.micro.loras import CONV, OUT, SHORTCUT, TEXT, Q, load_parts, random_lora, some_modules

NORM = "down_blocks.1.attentions.0.norm"


@pytest.fixture(scope="module")
def parts(micro_base: SDXLBase) -> dict[str, Any]:
    return load_parts(micro_base)


def entry(file: LoRAFile, strength: float = 1.0, name: str = "one") -> StackEntry:
    return StackEntry(LoRARef(Path(), name, strength, strength / 2), name, in_memory=file)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.1


def loha(rows: int, columns: int, rank: int = 2) -> LoHaModule:
    shapes = {"hada_w1_a": (rows, rank), "hada_w1_b": (rank, columns)}
    factors = {name: random(*shape) for name, shape in shapes.items()}
    factors |= {name.replace("w1", "w2"): random(*shape) + 0.1 for name, shape in shapes.items()}
    return LoHaModule(factors, 3.0)


def change(module: Any, shape: tuple[int, ...]) -> Tensor:
    return (module.change(torch.device("cpu")) * module.scale).reshape(shape)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    other_state = other.state_dict()
    return all(torch.allclose(value, other_state[name], atol=2e-7) for name, value in one.state_dict().items())


def test_concatenation_acts_as_the_stack_does(micro_base: SDXLBase, parts: dict[str, Any]) -> None:
    first = some_modules(parts)
    rows, columns = parts["unet"].get_submodule(OUT).weight.shape
    second = LoRAFile(
        unet={**random_lora(parts["unet"], (Q, CONV, SHORTCUT), rank=2), OUT: loha(rows, columns)},
        tokens={"ohwx": {"text_encoder": torch.ones(1, 8), "text_encoder_2": torch.ones(1, 12)}},
    )
    second.unet[f"{NORM}.bias"] = DiffModule(random(16))
    shares = [entry(first, 0.7), entry(second, -0.4, "two")]
    one = combine(shares, "concatenate", 0)
    assert one.tokens == second.tokens
    assert one.unet[Q].rank == first.unet[Q].rank + second.unet[Q].rank
    assert isinstance(one.unet[OUT], DiffModule)
    for part in ("unet", "text_encoder", "text_encoder_2"):
        ours, wanted = (load_part(micro_base, part, torch.float32) for _ in range(2))
        merge_stack(wanted, [(share.file.parts()[part], share.strength_by_module(part)) for share in shares])
        assert not merge_into(ours, one.parts()[part], 1.0).missing
        assert same_weights(ours, wanted)


@pytest.mark.parametrize("kind", ["loha", "lokr", "whole lokr", "diff", "lora"])
def test_a_single_lora_keeps_its_kind_at_any_strength(kind: str) -> None:
    lokr: dict[str, Tensor] = {"lokr_w1": random(2, 3), "lokr_w2_a": random(4, 2), "lokr_w2_b": random(2, 2)}
    module: Any = {
        "loha": loha(8, 6),
        "lokr": LoKrModule(lokr, 3.0),
        "whole lokr": LoKrModule({"lokr_w1": random(2, 3), "lokr_w2": random(4, 2)}, 3.0),
        "diff": DiffModule(random(8, 6)),
        "lora": LoRAModule(random(2, 6), random(8, 2), 3.0),
    }[kind]
    (scaled,) = single(entry(LoRAFile(unet={Q: module}), 0.3)).unet.values()
    assert type(scaled) is type(module)
    torch.testing.assert_close(change(scaled, (8, 6)), 0.3 * change(module, (8, 6)))


def test_a_dora_has_no_sum() -> None:
    dora = LoRAFile(unet={Q: LoRAModule(random(2, 6), random(8, 2), 3.0, torch.ones(8, 1))})
    assert single(entry(dora)).unet[Q].dora_scale is not None
    for call in (
        lambda: single(entry(dora, 0.5)),
        lambda: combine([entry(dora), entry(dora)], "concatenate", 0),
    ):
        with pytest.raises(ValueError, match=f"{Q} is a DoRA.*use Save Merged Base"):
            call()


# ------------------------------------------------------------------ against peft


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 10)
        self.conv1 = nn.Conv2d(5, 6, 3)


def peft_pair(target: str) -> tuple[Any, list[StackEntry]]:
    """Two adapters in peft on one layer, and the same for us with weights 0.7 and -0.4."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=6, target_modules=[target], init_lora_weights=False)
    model: Any = get_peft_model(Small(), config, adapter_name="a")
    model.add_adapter("b", config)
    layer = model.base_model.model.get_submodule(target)
    shares = []
    for name, weight in (("a", 0.7), ("b", -0.4)):
        module = LoRAModule(layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach(), 6.0)
        shares.append(entry(LoRAFile(unet={target: module}), weight, name))
    return model, shares


@pytest.mark.parametrize("target", ["linear", "conv1"])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("concatenate", "cat"),
        ("linear", "linear"),
        ("svd", "svd"),
        ("ties", "ties_svd"),
        ("dare", "dare_linear_svd"),
        ("dare_ties", "dare_ties_svd"),
    ],
)
def test_each_method_is_pefts(ours: Any, theirs: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def same_draws(tensor: Tensor, density: float, rescale: bool) -> Tensor:
        draw = torch.Generator().manual_seed(0)
        return tensor * (torch.rand(tensor.shape, generator=draw) < density) / (density if rescale else 1)

    monkeypatch.setattr("peft.utils.merge_utils.random_pruning", same_draws)
    model, shares = peft_pair(target)
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "merged", theirs, svd_rank=3, density=0.6)
    wanted = model.base_model.model.get_submodule(target).get_delta_weight("merged")
    merged = combine(shares, ours, 3, Reduction(0.6)).unet[target]
    assert merged.rank == {"concatenate": 8, "linear": 4}.get(ours, 3)
    torch.testing.assert_close(change(merged, wanted.shape), wanted.detach(), atol=2e-6, rtol=1e-5)


def test_linear_needs_equal_ranks(parts: dict[str, Any]) -> None:
    shares = [entry(LoRAFile(unet={**random_lora(parts["unet"], (Q,), rank)})) for rank in (2, 3)]
    with pytest.raises(ValueError, match=r"method is linear and .* has ranks \[2, 3\]: use svd"):
        combine(shares, "linear", 8)


def test_merging_leaves_the_random_numbers_of_others_alone() -> None:
    _, shares = peft_pair("linear")
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    one, same, other = (combine(shares, "dare", 3, Reduction(0.5, seed)).unet["linear"].up for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), wanted)
    assert torch.equal(one, same) and not torch.equal(one, other)


# ------------------------------------------------------------------ smaller ranks


def best(matrix: Tensor, rank: int) -> Tensor:
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return ((left[:, :rank] * values[:rank]) @ right[:rank]).float()


@pytest.mark.parametrize("shape", [(40, 24), (12, 6, 3, 3)])
@pytest.mark.parametrize("make", ["lora", "loha", "diff"])
def test_a_resized_module_is_the_best_of_its_rank(make: str, shape: tuple[int, ...]) -> None:
    rows, columns = shape[0], int(torch.Size(shape[1:]).numel())
    ones = [1] * (len(shape) - 2)
    kinds: dict[str, Callable[[], Any]] = {
        "lora": lambda: LoRAModule(random(8, *shape[1:]), random(rows, 8, *ones), 5.0),
        "loha": lambda: loha(rows, columns, 3),
        "diff": lambda: DiffModule(random(*shape)),
    }
    module, path = kinds[make](), CONV if ones else Q
    file = LoRAFile(unet={path: module}, metadata={"ss_steps": "1"})
    smaller = resize(file, 3, 1.0)
    resized = smaller.unet[path]
    assert (type(resized), resized.rank, smaller.metadata) == (LoRAModule, 3, file.metadata)
    assert tuple(resized.shape) == shape
    wanted = best(change(module, shape).flatten(1), 3)
    torch.testing.assert_close(change(resized, shape).flatten(1), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_the_leading_directions_of_a_large_change_are_found() -> None:
    large = DiffModule(random(1100, 12) @ random(12, 1000) + 0.001 * random(1100, 1000))
    resized = resize(LoRAFile(unet={Q: large}), 12, 1.0).unet[Q]
    error = (change(resized, (1100, 1000)) - best(large.diff, 12)).norm()
    assert error <= 1e-3 * (large.diff - best(large.diff, 12)).norm()


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_as_few_directions_as_hold_the_energy_are_kept(energy: float) -> None:
    module = LoRAModule(random(16, 24) * torch.logspace(0, -3, 16)[:, None], random(40, 16), 5.0)
    resized = resize(LoRAFile(unet={Q: module}), 0, energy).unet[Q]
    values = torch.linalg.svdvals(change(module, (40, 24)).double()) ** 2
    kept = values[: resized.rank].sum() / values.sum()
    assert kept >= energy > values[: resized.rank - 1].sum() / values.sum()
    limited = resize(LoRAFile(unet={Q: module}), 1, energy).unet[Q]
    assert limited.rank == 1


def test_what_is_small_enough_stays_as_it_is() -> None:
    dora = LoRAModule(random(4, 24), random(40, 4), 5.0, torch.ones(40, 1))
    file = LoRAFile(unet={Q: dora, f"{NORM}.bias": DiffModule(random(16))}, text_encoder={TEXT: loha(8, 8)})
    same = resize(file, 0, 1.0)
    assert same.unet == file.unet and same.text_encoder == file.text_encoder
    smaller = resize(file, 2, 1.0)
    assert smaller.unet[Q].rank == 2 and smaller.unet[Q].dora_scale is dora.dora_scale
    assert smaller.unet[f"{NORM}.bias"] is file.unet[f"{NORM}.bias"]
