"""Merges several LoRAs into one, and reduces the rank of LoRAs.

The weight change of a LoRA is alpha / rank * B A. Concatenation keeps the sum of the changes exactly, and svd is its
best approximation of a given rank. ties (Yadav et al., arXiv 2306.01708) and dare (Yu et al., arXiv 2311.03099)
sparsify the changes before adding them, as peft does. linear, as in peft, adds the factors, which is not the sum of the
changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from ..hashed_random import seed_of
from ..sdxl.family import Part
from .config import MergeMethod
from .modules import AdapterModule, DiffModule, LoKrModule, LoRAFile, LoRAModule
from .stack import StackEntry

OnModule = Callable[[int, int], object]  # modules done, of how many
Term = tuple[AdapterModule, float]

_KERNELS = ("conv", "conv1", "conv2", "conv_in", "conv_out")  # SDXL's 3x3 convolutions, by the end of their path
_EXACT_SVD = 2**20  # elements of a matrix from which only its leading singular vectors are computed


@dataclass(frozen=True)
class Reduction:
    """The sparsification of ties and dare: they keep the fraction `density`, and dare chooses it by `seed`."""

    density: float = 0.5
    seed: int = 0


def combine(
    stack: Sequence[StackEntry],
    method: MergeMethod,
    rank: int,
    reduction: Reduction | None = None,
    on_module: OnModule = lambda done, total: None,
) -> LoRAFile:
    """Merges a stack into one LoRA. `rank` is that of svd, ties and dare; the other methods determine their own.

    New tokens are kept; of those with equal names the last. `on_module` may raise to cancel.
    Raises ValueError for a DoRA, whose effect depends on the base's weights, and for different ranks with linear.
    """
    combined = LoRAFile(tokens={name: rows for entry in stack for name, rows in entry.file.tokens.items()})
    modules = list(_terms(stack))
    for done, (path, part, terms) in enumerate(modules):
        on_module(done, len(modules))
        for change, _ in terms:
            _require_free_of_base(path, change)
        shape = _shape(path, [change for change, _ in terms])
        values = [(change, strength) for change, strength in terms if strength]
        if values and len(shape) == 1:
            combined.parts()[part][path] = _full_diff(shape, values)
        elif values:
            combined.parts()[part][path] = _combined(path, shape, values, method, rank, reduction or Reduction())
    on_module(len(modules), len(modules))
    return combined


def single(entry: StackEntry) -> LoRAFile:
    """A LoRA scaled by its strength, of its own kind. Raises ValueError for a DoRA at a strength other than 1."""
    file = LoRAFile(tokens=dict(entry.file.tokens), metadata=dict(entry.file.metadata))
    for path, part, ((change, strength),) in _terms([entry]):
        if strength != 1:
            _require_free_of_base(path, change)
        if strength:
            file.parts()[part][path] = _times(change, strength)
    return file


def resize(file: LoRAFile, rank: int, energy: float, on_module: OnModule = lambda done, total: None) -> LoRAFile:
    """Reduces each module to at most `rank` (0: any) and to the fraction `energy` of its weight change.

    The energy of a change is the sum of its squared singular values. The magnitudes of a DoRA, norms and biases are
    kept.
    """
    resized = LoRAFile(tokens=dict(file.tokens), metadata=dict(file.metadata))
    done, total = 0, sum(map(len, file.parts().values()))
    for part, modules in file.parts().items():
        for path, change in modules.items():
            on_module(done, total)
            resized.parts()[part][path] = _resized(path, change, rank, energy)
            done += 1
    on_module(total, total)
    return resized


def _terms(stack: Sequence[StackEntry]) -> Iterator[tuple[str, Part, list[Term]]]:
    for part in LoRAFile().parts():
        for path in dict.fromkeys(path for entry in stack for path in entry.file.parts()[part]):
            acting = [entry for entry in stack if path in entry.file.parts()[part]]
            yield (
                path,
                part,
                [(entry.file.parts()[part][path], entry.strength_by_module(part)(path)) for entry in acting],
            )


def _require_free_of_base(path: str, change: AdapterModule) -> None:
    magnitude = change.magnitude if isinstance(change, LoRAModule) else None
    if change.dora_scale is not None or magnitude is not None:
        raise ValueError(
            f"{path} is a DoRA, whose effect depends on the base's weights, so it cannot be added to others, scaled or "
            "converted: remove that LoRA, leave it at strength 1, or use Save Merged Base"
        )


def _shape(path: str, changes: Sequence[AdapterModule]) -> tuple[int, ...]:
    """The shape of the weight. A factored kernel may be stored flat; SDXL's convolutions are known by their names."""
    shape = max((change.shape for change in changes), key=len)
    if any(prod(change.shape) != prod(shape) for change in changes):
        raise ValueError(f"{path} has different sizes in the LoRAs: they were made for different models")
    if len(shape) == 2 and path.rpartition(".")[2] in _KERNELS:
        return shape[0], shape[1] // 9, 3, 3
    return (*shape[:2], 1, 1) if path.endswith("conv_shortcut") else shape


def _combined(
    path: str, shape: tuple[int, ...], terms: Sequence[Term], method: MergeMethod, rank: int, reduction: Reduction
) -> AdapterModule:
    match method:
        case "concatenate":
            return _concatenated(shape, terms)
        case "linear":
            return _linear(path, terms)
        case "svd":
            concatenated = _concatenated(shape, terms)
            return _resized(path, concatenated, rank, 1.0)
        case _:
            from peft.utils import merge_utils

            methods = {"ties": merge_utils.ties, "dare": merge_utils.dare_linear, "dare_ties": merge_utils.dare_ties}
            changes = [_change(change).reshape(shape) for change, _ in terms]
            weights = torch.tensor([strength for _, strength in terms])
            with _seeded(reduction.seed, path):
                merged = methods[method](changes, weights, reduction.density)
            return _factored(merged, rank, 1.0)


def _concatenated(shape: tuple[int, ...], terms: Sequence[Term]) -> AdapterModule:
    """[s1 B1, s2 B2, ...] [A1; A2; ...]; other kinds than LoRA become a full-rank diff."""
    loras = [(change, strength) for change, strength in terms if isinstance(change, LoRAModule)]
    if len(loras) < len(terms):
        return _full_diff(shape, terms)
    down = torch.cat([lora.down.float().flatten(1) for lora, _ in loras])
    up = torch.cat([lora.up.float().flatten(1) * (strength * lora.scale) for lora, strength in loras], dim=1)
    return _lora(down, up, shape)


def _full_diff(shape: tuple[int, ...], terms: Sequence[Term]) -> DiffModule:
    return DiffModule(sum((strength * _change(change) for change, strength in terms), torch.zeros(())).reshape(shape))


def _linear(path: str, terms: Sequence[Term]) -> AdapterModule:
    loras = [(change, strength) for change, strength in terms if isinstance(change, LoRAModule)]
    ranks = {lora.rank for lora, _ in loras}
    if len(loras) < len(terms) or len(ranks) > 1:
        found = "kinds other than LoRA" if len(loras) < len(terms) else f"ranks {sorted(ranks)}"
        raise ValueError(
            f"method is linear and {path} has {found}: use svd or concatenate, which do not need equal ranks"
        )
    roots = [math.sqrt(abs(strength * lora.scale)) for lora, strength in loras]
    signs = [math.copysign(1, strength * lora.scale) for lora, strength in loras]
    down = sum(sign * root * lora.down.float() for (lora, _), root, sign in zip(loras, roots, signs, strict=True))
    up = sum(root * lora.up.float() for (lora, _), root in zip(loras, roots, strict=True))
    return LoRAModule(torch.as_tensor(down), torch.as_tensor(up), float(loras[0][0].rank))


def _resized(path: str, change: AdapterModule, rank: int, energy: float) -> AdapterModule:
    shape = _shape(path, [change])
    requested = energy < 1 or rank > 0 and (rank < change.rank or not isinstance(change, LoRAModule))
    if len(shape) == 1 or not requested:
        return change
    if isinstance(change, LoRAModule):
        return replace(_shrunk(change, rank, energy), dora_scale=change.dora_scale, magnitude=change.magnitude)
    _require_free_of_base(path, change)
    return _factored(_change(change).reshape(shape), rank, energy)


def _shrunk(lora: LoRAModule, rank: int, energy: float) -> LoRAModule:
    """The SVD of B A without computing the product: QR reduces both factors to triangles of the rank's size first."""
    up, upper = torch.linalg.qr(lora.up.double().flatten(1) * lora.scale)
    down, lower = torch.linalg.qr(lora.down.double().flatten(1).T)
    left, values, right = torch.linalg.svd(upper @ lower.T)
    keep = _kept(values, rank, energy, float((values**2).sum()))
    return _leading(up @ left, values, right @ down.T, lora.shape, keep)


def _factored(change: Tensor, rank: int, energy: float) -> LoRAModule:
    """A change [out, in, ...] as a LoRA."""
    matrix = change.float().flatten(1)
    if energy >= 1 and rank and matrix.numel() > _EXACT_SVD and rank < min(matrix.shape) // 4:
        with _seeded(0, "svd"):
            left, values, right = torch.svd_lowrank(matrix, q=rank + 16, niter=8)
        right = right.T
    else:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    keep = _kept(values, rank, energy, float(matrix.double().square().sum()))
    return _leading(left, values, right, tuple(change.shape), keep)


def _kept(values: Tensor, rank: int, energy: float, total: float) -> int:
    """The number of singular values that `rank` (0: any) and the fraction `energy` of `total` keep."""
    energies = (values.double() ** 2).cumsum(0)
    enough = int((energies < energy * total).sum()) + 1 if energy < 1 else len(values)
    return max(1, min(enough, rank or len(values), len(values)))


def _leading(left: Tensor, values: Tensor, right: Tensor, shape: tuple[int, ...], keep: int) -> LoRAModule:
    """The first `keep` singular vectors, the values split evenly between the two factors."""
    root = values[:keep].sqrt()
    return _lora((root[:, None] * right[:keep]).float(), (left[:, :keep] * root).float(), shape)


def _lora(down: Tensor, up: Tensor, shape: tuple[int, ...]) -> LoRAModule:
    """Flat factors reshaped for the weight's shape, at a scale of 1."""
    ones = [1] * (len(shape) - 2)
    return LoRAModule(
        down.reshape(-1, *shape[1:]).contiguous(), up.reshape(*up.shape, *ones).contiguous(), float(len(down))
    )


def _change(module: AdapterModule) -> Tensor:
    return module.change(torch.device("cpu")) * module.scale


def _times(change: AdapterModule, strength: float) -> AdapterModule:
    if strength == 1:
        return change
    if isinstance(change, LoKrModule) and not change.rank:  # alpha does not scale it
        return replace(change, factors={**change.factors, "lokr_w1": change.factors["lokr_w1"].float() * strength})
    return replace(change, alpha=change.alpha * strength)


@contextmanager
def _seeded(seed: int, name: str) -> Iterator[None]:
    """Seeds torch by the arguments and restores the global generator afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "merge", name))
        yield
