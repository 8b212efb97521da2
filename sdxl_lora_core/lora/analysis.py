"""What the LoRAs of a stack change, and which of them work against each other: arithmetic on their files alone.

A LoRA changes a weight by D = U V, with U [out, r] times its scale and strength, and V [r, in]. Everything here follows
from the Gram matrices of all LoRAs' factors of a weight, U^T U and V V^T, so the changes themselves are never formed:

- inner product <D1, D2> = sum((U1^T U2) * (V1 V2^T)), and from it norms, cosines and the norm of the sum;
- effective rank exp(entropy of the singular values over their sum) (Roy and Vetterli, EUSIPCO 2007);
- overlap: the share of |D2|^2 that is left when D2 is projected onto the column and row spaces of D1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..sdxl.blocks import BLOCKS, is_in_block
from ..sdxl.family import PARTS
from .modules import AdapterModule, LoRAModule
from .stack import StackEntry

OTHER = "other layers"  # of the UNet, outside its blocks
# Independent LoRAs of rank 16 have cosines within 0.01. Beyond these, images show it.
FIGHTING, REINFORCING = -0.1, 0.25
_RANK_LIMIT = 1e-10  # of the largest eigenvalue, below which a direction is rounding


@dataclass(frozen=True)
class BlockEnergy:
    """What a LoRA changes in a block: `energy` is the share of its squared norm, in 0..1.

    `effective_rank` is the mean over the block's weights, weighted by their squared norms.
    """

    energy: float
    effective_rank: float


@dataclass(frozen=True)
class LoRAEnergy:
    """A LoRA at its strengths: the Frobenius norm of its changes, and where they are."""

    name: str
    norm: float
    blocks: dict[str, BlockEnergy]


@dataclass(frozen=True)
class Overlap:
    """How the changes of two LoRAs meet.

    `cosine` in -1..1: 1 if they are the same, -1 if one takes the other back. `overlap` in 0..1: the mean of the shares
    of each one's squared norm that lie in the spaces the other one changes. `opposed` in 0..1: of the inner products
    of their weights, by absolute value, the share that is negative.
    """

    cosine: float
    overlap: float
    opposed: float


@dataclass(frozen=True)
class PairOverlap:
    """Two LoRAs of a stack: in all weights, and by block where both change something."""

    first: str
    second: str
    whole: Overlap
    blocks: dict[str, Overlap]


@dataclass(frozen=True)
class StackAnalysis:
    """`joint_norm` is the norm of the sum of all changes, `independent_norm` what it were if no two overlapped."""

    loras: tuple[LoRAEnergy, ...]
    pairs: tuple[PairOverlap, ...]
    joint_norm: float
    independent_norm: float
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def sentences(self) -> list[str]:
        """Which LoRAs work against each other and where, which do the same, and how strong the stack is."""
        found = [line for pair in self.pairs for line in _sentences(pair)]
        return [*(found or [_peace(len(self.loras))]), *_strength(self), *self.notes]


def analyse_stack(stack: Sequence[StackEntry]) -> StackAnalysis:
    """Analyses the LoRAs of a stack at their strengths, those of strength 0 left out by `open_stack`.

    Raises ValueError if the stack is empty, if a LoRA changes nothing, or if two change a weight of different shapes:
    they were made for different bases.
    """
    if not stack:
        raise ValueError("the stack has no LoRA of a strength other than 0: connect at least one")
    blocks: dict[str, _Sums] = {}
    notes: list[str] = []
    for part in PARTS:
        layers = [(entry.modules(part), entry.strength_by_module(part)) for entry in stack]
        for weight in dict.fromkeys(name for modules, _ in layers for name in modules):
            changed = [
                (number, _factors(modules[weight], strength(weight)))
                for number, (modules, strength) in enumerate(layers)
                if weight in modules and strength(weight)
            ]
            _require_one_shape(weight, [(stack[number].ref.name, factors) for number, factors in changed])
            block = _block_of(weight) if part == "unet" else part
            blocks.setdefault(block, _Sums(len(stack))).add(changed)
    for entry in stack:
        modules = [module for part in PARTS for module in entry.modules(part).values()]
        if any(isinstance(module, LoRAModule) and module.is_dora for module in modules):
            notes.append(f"{entry.ref.name} is a DoRA: its rescaling depends on the base's weights and is not counted")
    return _analysis(_names(stack), blocks, tuple(notes))


class _Sums:
    """Sums over the weights of a block, for n LoRAs; matrices are [n, n]."""

    def __init__(self, count: int) -> None:
        self.inner = np.zeros((count, count))
        self.absolute = np.zeros((count, count))
        self.projected = np.zeros((count, count))  # |P_i D_j|^2
        self.ranks = np.zeros(count)  # weighted by squared norms

    def add(self, changed: Sequence[tuple[int, tuple[Tensor, Tensor]]]) -> None:
        """Adds a weight: the numbers of the LoRAs that change it, with their factors."""
        if not changed:
            return
        numbers = [number for number, _ in changed]
        inner, projected, ranks = _measure([factors for _, factors in changed])
        at = np.ix_(numbers, numbers)
        self.inner[at] += inner
        self.absolute[at] += np.abs(inner)
        self.projected[at] += projected
        self.ranks[numbers] += ranks * np.diag(inner)

    def plus(self, other: _Sums) -> _Sums:
        total = _Sums(len(self.ranks))
        for name, values in vars(self).items():
            setattr(total, name, values + getattr(other, name))
        return total

    def overlap(self, one: int, other: int) -> Overlap:
        first, second = self.inner[one, one], self.inner[other, other]
        shares = (self.projected[one, other] / second, self.projected[other, one] / first)
        absolute = self.absolute[one, other]
        return Overlap(
            cosine=float(np.clip(self.inner[one, other] / np.sqrt(first * second), -1, 1)),
            overlap=float(np.clip(sum(shares) / 2, 0, 1)),
            opposed=float(0.5 - self.inner[one, other] / absolute / 2) if absolute else 0.0,
        )


def _measure(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inner products [n, n], squared norms of projections [n, n] and effective ranks [n] of the changes of a weight."""
    ups, downs = torch.cat([up for up, _ in factors], 1), torch.cat([down for _, down in factors])
    left, right = (ups.T @ ups).numpy(), (downs @ downs.T).numpy()
    starts = np.cumsum([0, *(down.shape[0] for _, down in factors)])
    spans = [slice(start, end) for start, end in pairwise(starts)]
    products = np.add.reduceat(left * right, starts[:-1], axis=0)
    inner = np.add.reduceat(products, starts[:-1], axis=1)
    projected, ranks = [], []
    for span in spans:
        (root_up, inverse_up), (root_down, inverse_down) = _roots(left[span, span]), _roots(right[span, span])
        rows, columns = inverse_up @ left[span], right[:, span] @ inverse_down
        projected.append([np.square(rows[:, other] @ columns[other]).sum() for other in spans])
        ranks.append(_effective_rank(np.linalg.svd(root_up @ root_down, compute_uv=False)))
    return inner, np.array(projected), np.array(ranks)


def _roots(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The square root of a positive semidefinite matrix, and its inverse on the space that the matrix spans."""
    values, vectors = np.linalg.eigh(gram)
    spanned = values > max(values[-1], 0) * _RANK_LIMIT
    roots = np.sqrt(np.where(spanned, values, 1))
    return vectors * (roots * spanned) @ vectors.T, vectors * (spanned / roots) @ vectors.T


def _effective_rank(singular: np.ndarray) -> float:
    """0 for a change that is zero everywhere."""
    shares = singular[singular > 0] / (singular.sum() or 1)
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def _factors(module: AdapterModule, strength: float) -> tuple[Tensor, Tensor]:
    """A change as U [out, r] and V [r, in], float64; a change that is no product has the identity as one of them."""
    if isinstance(module, LoRAModule):
        up, down = module.up.detach().flatten(1).double(), module.down.detach().flatten(1).double()
        return up * (module.scale * strength), down
    change = module.change(torch.device("cpu")).double() * (module.scale * strength)
    change = change.flatten(1) if change.dim() > 1 else change[:, None]
    out, columns = change.shape
    if columns <= out:
        return change, torch.eye(columns, dtype=torch.float64)
    return torch.eye(out, dtype=torch.float64), change


def _require_one_shape(weight: str, changed: Sequence[tuple[str, tuple[Tensor, Tensor]]]) -> None:
    shapes = {name: (up.shape[0], down.shape[1]) for name, (up, down) in changed}
    if len(set(shapes.values())) > 1:
        found = ", ".join(f"{name} {out} x {columns}" for name, (out, columns) in shapes.items())
        raise ValueError(
            f"the LoRAs were made for different bases: they change {weight} as matrices of different shapes ({found}): "
            "remove one of them from the stack"
        )


def _block_of(weight: str) -> str:
    """The innermost block of a weight of the UNet; a text encoder is one block."""
    inside = [block for block in BLOCKS if is_in_block(weight, [block])]
    return max(inside, key=len, default=OTHER)


def _place(block: str) -> tuple[int, str]:
    """Sorts blocks as the UNet goes through them, each stage before its attention blocks."""
    return next(number for number, stage in enumerate(BLOCKS) if is_in_block(block, [stage])), block


def _names(stack: Sequence[StackEntry]) -> list[str]:
    """The LoRAs' names, numbered where a LoRA is there several times."""
    names = [entry.ref.name for entry in stack]
    return [f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _analysis(names: Sequence[str], blocks: dict[str, _Sums], notes: tuple[str, ...]) -> StackAnalysis:
    order = [*sorted(BLOCKS, key=_place), OTHER, *PARTS]
    blocks = dict(sorted(blocks.items(), key=lambda item: order.index(item[0])))
    total = _Sums(len(names))
    for sums in blocks.values():
        total = total.plus(sums)
    energies = np.diag(total.inner)
    if nothing := [name for name, energy in zip(names, energies, strict=True) if not energy > 0]:
        raise ValueError(f"LoRA {nothing[0]} changes nothing: all its weights are zero: remove it from the stack")
    return StackAnalysis(
        loras=tuple(_energy(name, number, energies[number], blocks) for number, name in enumerate(names)),
        pairs=tuple(_pair(names, one, other, total, blocks) for one, other in combinations(range(len(names)), 2)),
        joint_norm=float(np.sqrt(max(total.inner.sum(), 0))),
        independent_norm=float(np.sqrt(energies.sum())),
        notes=notes,
    )


def _energy(name: str, number: int, energy: float, blocks: dict[str, _Sums]) -> LoRAEnergy:
    own = {block: sums for block, sums in blocks.items() if sums.inner[number, number] > 0}
    shares = {
        block: BlockEnergy(
            float(sums.inner[number, number] / energy), float(sums.ranks[number] / sums.inner[number, number])
        )
        for block, sums in own.items()
    }
    return LoRAEnergy(name, float(np.sqrt(energy)), shares)


def _pair(names: Sequence[str], one: int, other: int, total: _Sums, blocks: dict[str, _Sums]) -> PairOverlap:
    shared = {
        block: sums for block, sums in blocks.items() if sums.inner[one, one] > 0 and sums.inner[other, other] > 0
    }
    overlaps = {block: sums.overlap(one, other) for block, sums in shared.items()}
    return PairOverlap(names[one], names[other], total.overlap(one, other), overlaps)


def _sentences(pair: PairOverlap) -> list[str]:
    both = f"{pair.first} and {pair.second}"
    against = {block: found for block, found in pair.blocks.items() if found.cosine <= FIGHTING}
    alike = {block: found for block, found in pair.blocks.items() if found.cosine >= REINFORCING}
    lines = []
    if against:
        lines.append(f"{both} work against each other in {_listed(against)}: lower one of them there with blocks")
    if alike:
        lines.append(f"{both} do the same in {_listed(alike)}: together they may be too strong")
    return lines


def _listed(blocks: dict[str, Overlap]) -> str:
    """The blocks with the largest cosines first."""
    ordered = sorted(blocks.items(), key=lambda item: -abs(item[1].cosine))
    named = [f"{block} (cosine {found.cosine:.2f}, overlap {found.overlap:.0%})" for block, found in ordered[:3]]
    return ", ".join(named) + (f" and {len(ordered) - 3} more blocks" if len(ordered) > 3 else "")


def _peace(count: int) -> str:
    return "There is one LoRA, so none is worked against." if count == 1 else "No two LoRAs work against each other."


def _strength(analysis: StackAnalysis) -> list[str]:
    alone = ", ".join(f"{lora.name} {lora.norm:.3g}" for lora in analysis.loras)
    if len(analysis.loras) == 1:
        return [f"Norm of its changes: {alone}"]
    ratio = analysis.joint_norm / analysis.independent_norm
    return [
        f"Norm of all changes together: {analysis.joint_norm:.3g}, {ratio:.2f} times that of LoRAs that do not meet "
        f"({alone})"
    ]
