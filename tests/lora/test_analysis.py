"""The analysis of a stack against closed forms and against the changes themselves."""

from __future__ import annotations

import json
import math

import pytest
import torch

from sdxl_lora_core.lora.analysis import OTHER, analyse_stack
from sdxl_lora_core.lora.modules import DiffModule, LoKrModule, LoRAFile, LoRAModule
from sdxl_lora_core.lora.stack import StackEntry, entry_in_memory

QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
VALUE = "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_v"


def lora(
    rank: int = 4, seed: int = 0, *, start: int = 0, sign: float = 1.0, out: int = 24, columns: int = 20
) -> LoRAModule:
    """Random orthonormal factors on the coordinates from `start` on."""
    random = torch.Generator().manual_seed(seed)
    up, down = torch.zeros(out, rank), torch.zeros(rank, columns)
    up[start : start + 8] = torch.linalg.qr(torch.randn(8, rank, generator=random))[0] * sign
    down[:, start : start + 8] = torch.linalg.qr(torch.randn(8, rank, generator=random))[0].T
    return LoRAModule(down, up, alpha=float(rank))


def entry(name: str, strength: float = 1.0, blocks: str = "", **unet: object) -> StackEntry:
    found = entry_in_memory(name, LoRAFile(unet={path.replace("__", "."): module for path, module in unet.items()}))  # type: ignore[misc]
    return StackEntry(
        type(found.ref)(found.ref.path, name, strength, strength, blocks), found.sha256, in_memory=found.in_memory
    )


def one(name: str, module: object, strength: float = 1.0, path: str = QUERY) -> StackEntry:
    return entry(name, strength, **{path.replace(".", "__"): module})


@pytest.mark.parametrize(
    ("other", "cosine", "overlap", "opposed", "joint"),
    [
        (lora(), 1.0, 1.0, 0.0, 4.0),
        (lora(sign=-1.0), -1.0, 1.0, 1.0, 0.0),
        (lora(start=8), 0.0, 0.0, 0.0, math.sqrt(8)),
    ],
    ids=["itself", "its negative", "orthogonal"],
)
def test_closed_forms(other: LoRAModule, cosine: float, overlap: float, opposed: float, joint: float) -> None:
    """Four orthonormal directions: norm 2, effective rank 4."""
    found = analyse_stack([one("a", lora()), one("b", other)])
    (pair,) = found.pairs
    for measured in (pair.whole, pair.blocks["down_blocks.1.attentions.0"]):
        assert [measured.cosine, measured.overlap, measured.opposed] == pytest.approx(
            [cosine, overlap, opposed], abs=1e-5
        )
    assert found.joint_norm == pytest.approx(joint, abs=1e-5) and found.independent_norm == pytest.approx(math.sqrt(8))
    for energy in found.loras:
        assert energy.norm == pytest.approx(2, abs=1e-5)
        assert energy.blocks["down_blocks.1.attentions.0"].effective_rank == pytest.approx(4, abs=1e-5)


def test_random_loras_of_every_kind_against_their_changes() -> None:
    random = torch.Generator().manual_seed(1)
    matrix = lambda *shape: torch.randn(*shape, generator=random)  # noqa: E731
    modules = [
        LoRAModule(matrix(3, 20), matrix(24, 3), alpha=2.0),
        LoKrModule({"lokr_w1": matrix(4, 4), "lokr_w2": matrix(6, 5)}, alpha=1.0),
        DiffModule(matrix(24, 20)),
    ]
    strengths = [0.7, -1.3, 0.2]
    found = analyse_stack([one(f"{i}", m, s) for i, (m, s) in enumerate(zip(modules, strengths, strict=True))])
    changes = [(m.change(torch.device("cpu")) * m.scale * s).double() for m, s in zip(modules, strengths, strict=True)]
    assert [lora.norm for lora in found.loras] == pytest.approx([float(c.norm()) for c in changes], rel=1e-5)
    assert found.joint_norm == pytest.approx(float(sum(changes).norm()), rel=1e-5)  # type: ignore[union-attr]
    for pair in found.pairs:
        a, b = changes[int(pair.first)], changes[int(pair.second)]
        assert pair.whole.cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), abs=1e-5)
        shares = [
            float(projected(a, b).square().sum() / b.square().sum()),
            float(projected(b, a).square().sum() / a.square().sum()),
        ]
        assert pair.whole.overlap == pytest.approx(sum(shares) / 2, abs=1e-5)
    for measured, change in zip(found.loras, changes, strict=True):
        shares = torch.linalg.svdvals(change)
        shares = shares[shares > 1e-6] / shares.sum()
        expected = float(torch.exp(-(shares * shares.log()).sum()))
        assert measured.blocks["down_blocks.1.attentions.0"].effective_rank == pytest.approx(expected, rel=1e-4)


def projected(onto: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    rank = int(torch.linalg.matrix_rank(onto, rtol=1e-5))
    left, _, right = torch.linalg.svd(onto)
    left, right = left[:, :rank], right[:rank]
    return left @ left.T @ change @ right.T @ right


def test_blocks_have_their_own_numbers_and_energies_add_up_to_one() -> None:
    a = entry("a", **{QUERY.replace(".", "__"): lora(), VALUE.replace(".", "__"): lora(seed=1)})
    b = entry(
        "b", **{QUERY.replace(".", "__"): lora(), VALUE.replace(".", "__"): lora(seed=1, sign=-1.0), "conv_in": lora()}
    )
    found = analyse_stack([a, b])
    (pair,) = found.pairs
    cosines = {block: round(overlap.cosine, 5) for block, overlap in pair.blocks.items()}
    assert cosines == {"down_blocks.1.attentions.0": 1.0, "up_blocks.0.attentions.1": -1.0}
    assert pair.whole.cosine == pytest.approx(0, abs=1e-5) and pair.whole.opposed == pytest.approx(0.5)
    assert pair.whole.overlap == pytest.approx((1 + 2 / 3) / 2, abs=1e-5)
    assert [block for block in found.loras[1].blocks][-1] == OTHER
    for energy in found.loras:
        assert sum(block.energy for block in energy.blocks.values()) == pytest.approx(1)
    against, alike, *_ = found.sentences()
    assert "a and b work against each other in up_blocks.0.attentions.1 (cosine -1.00, overlap 100%)" in against
    assert "a and b do the same in down_blocks.1.attentions.0 (cosine 1.00, overlap 100%)" in alike


def test_strengths_and_block_strengths_count() -> None:
    paths = {QUERY.replace(".", "__"): lora(), VALUE.replace(".", "__"): lora()}
    whole, halved = entry("a", 0.5, **paths), entry("b", 0.5, "up_blocks.0=0", **paths)
    found = analyse_stack([whole, halved])
    assert [energy.norm for energy in found.loras] == pytest.approx([math.sqrt(2), 1], abs=1e-5)
    assert list(found.loras[1].blocks) == ["down_blocks.1.attentions.0"]


def test_text_encoders_are_blocks_of_their_own() -> None:
    found = entry_in_memory(
        "t", LoRAFile(text_encoder={"text_model.x": lora()}, text_encoder_2={"text_model.x": lora()})
    )
    assert set(analyse_stack([found]).loras[0].blocks) == {"text_encoder", "text_encoder_2"}


def test_a_lora_twice_is_numbered_and_the_report_is_json() -> None:
    found = analyse_stack([one("a", lora()), one("a", lora(start=8))])
    assert [energy.name for energy in found.loras] == ["a (1)", "a (2)"]
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["pairs"][0]["first"] == "a (1)"
    assert found.sentences()[0] == "No two LoRAs work against each other."
    assert "1.00 times that of LoRAs that do not meet" in found.sentences()[1]


def test_a_dora_is_noted() -> None:
    dora = LoRAModule(lora().down, lora().up, 4.0, dora_scale=torch.ones(24, 1))
    assert "a is a DoRA" in analyse_stack([one("a", dora)]).sentences()[-1]


def test_what_cannot_be_analysed_is_named() -> None:
    with pytest.raises(ValueError, match="no LoRA of a strength other than 0"):
        analyse_stack([])
    with pytest.raises(ValueError, match=r"different shapes \(a 24 x 20, b 24 x 30\)"):
        analyse_stack([one("a", lora()), one("b", lora(columns=30))])
    zero = LoRAModule(torch.zeros(4, 20), torch.zeros(24, 4), 4.0)
    with pytest.raises(ValueError, match="LoRA z changes nothing"):
        analyse_stack([one("a", lora()), one("z", zero)])
