"""What an adapter is in memory: the factors of one weight's change, in the three forms that files hold.

All change a weight W [out, in, ...] by `scale * change()`. dora_scale, [out, 1, ...] or [1, in, ...], brings the
changed weight to these lengths; Liu et al., arXiv 2402.09353.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

LOHA_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


@dataclass(frozen=True, eq=False)
class LoRAModule:
    """alpha / rank * up @ down; Hu et al., arXiv 2106.09685.

    down [rank, in, ...] and up [out, rank, ...] may have trailing dimensions, as convolutions do.
    """

    kind: ClassVar[str] = "LoRA"
    down: Tensor
    up: Tensor
    alpha: float
    dora_scale: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight it changes: [out, in, ...]."""
        return (self.up.shape[0], *self.down.shape[1:])

    @property
    def factors(self) -> Mapping[str, Tensor]:
        """By kohya's names."""
        return {"lora_down.weight": self.down, "lora_up.weight": self.up}

    def change(self, device: torch.device) -> Tensor:
        """float32 [out, ...], without the scale."""
        return _moved(self.up, device).flatten(1) @ _moved(self.down, device).flatten(1)


@dataclass(frozen=True, eq=False)
class LoHaModule:
    """alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b), elementwise; Hyeon-Woo et al., arXiv 2108.06098.

    `factors` by LyCORIS' names: hada_w1_a [out, rank], hada_w1_b [rank, in * ...], the same of w2. A kernel factored
    once more has hada_t1 [rank, rank, h, w], and then hada_w1_a [rank, out] and hada_w1_b [rank, in].
    """

    kind: ClassVar[str] = "LoHa"
    factors: Mapping[str, Tensor]
    alpha: float
    dora_scale: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.factors["hada_w1_b"].shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight it changes, as far as the factors tell: [out, in * ...] or [out, in, h, w]."""
        a, b, kernel = self.factors["hada_w1_a"], self.factors["hada_w1_b"], self.factors.get("hada_t1")
        return (a.shape[0], b.shape[1]) if kernel is None else (a.shape[1], b.shape[1], *kernel.shape[2:])

    def change(self, device: torch.device) -> Tensor:
        """float32 [out, ...], without the scale."""
        return _product(self.factors, "hada", "1", device) * _product(self.factors, "hada", "2", device)


@dataclass(frozen=True, eq=False)
class LoKrModule:
    """w1 kron w2; Yeh et al., arXiv 2309.14859. alpha / rank scales it only where one of the two is factored.

    `factors` by LyCORIS' names: lokr_w1 [o1, i1] or lokr_w1_a [o1, rank] and lokr_w1_b [rank, i1]; lokr_w2 [o2, i2,
    ...] or lokr_w2_a [o2, rank] and lokr_w2_b [rank, i2 * ...]. A kernel factored once more has lokr_t2 as LoHa has.
    """

    kind: ClassVar[str] = "LoKr"
    factors: Mapping[str, Tensor]
    alpha: float
    dora_scale: Tensor | None = None

    @property
    def rank(self) -> int:
        """0 where both matrices are whole."""
        factored = self.factors.get("lokr_w2_b", self.factors.get("lokr_w1_b"))
        return 0 if factored is None else factored.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight it changes, as far as the factors tell: [out, in * ...]."""
        first, second = (_product(self.factors, "lokr", number, torch.device("meta")) for number in "12")
        return (first.shape[0] * second.shape[0], first.shape[1] * second.shape[1])

    def change(self, device: torch.device) -> Tensor:
        """float32 [out, ...], without the scale."""
        return torch.kron(*(_product(self.factors, "lokr", number, device) for number in "12"))


AdapterModule = LoRAModule | LoHaModule | LoKrModule


def _product(factors: Mapping[str, Tensor], kind: str, number: str, device: torch.device) -> Tensor:
    """One of the two matrices of a LoHa or LoKr, float32 [rows, columns]."""
    whole = factors.get(f"{kind}_w{number}")
    if whole is not None:
        return _moved(whole, device).flatten(1)
    a, b = (_moved(factors[f"{kind}_w{number}_{side}"], device) for side in "ab")
    kernel = factors.get(f"{kind}_t{number}")
    if kernel is None:
        return a @ b.flatten(1)
    return torch.einsum("ijhw,ip,jr->prhw", _moved(kernel, device), a, b).flatten(1)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device, torch.float32)
