"""What an adapter is in memory: the factors of one weight's change, in the four forms that files hold.

All change a weight W [out, in, ...] to V = W + scale * change(). A DoRA, Liu et al., arXiv 2402.09353, then brings V
to other lengths, and files tell them in two ways:

- magnitude [out, 1, ...], peft's: V times magnitude over the lengths of V's rows, which is the paper's equation 5;
- dora_scale, kohya's keys, as ComfyUI and Forge read it: [out, 1, ...] is divided by the lengths of *W's* rows, and
  [1, in, ...] by those of V's columns. Where training moved the lengths, the two differ by a tenth of what was learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..sdxl.loading import Part
from ..text.embedding_files import Vectors

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
    magnitude: Tensor | None = None

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
    def is_dora(self) -> bool:
        return self.dora_scale is not None or self.magnitude is not None

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


@dataclass(frozen=True, eq=False)
class DiffModule:
    """The change itself: of a norm, a bias, or a weight that was trained whole."""

    kind: ClassVar[str] = "whole change"
    diff: Tensor
    alpha: float = 1.0

    rank: ClassVar[int] = 0
    dora_scale: ClassVar[None] = None

    @property
    def scale(self) -> float:
        return self.alpha

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.diff.shape)

    @property
    def factors(self) -> Mapping[str, Tensor]:
        return {"diff": self.diff}

    def change(self, device: torch.device) -> Tensor:
        """float32, without the scale."""
        return _moved(self.diff, device)


AdapterModule = LoRAModule | LoHaModule | LoKrModule | DiffModule


@dataclass
class LoRAFile:
    """What a file holds: changes by the path of the weight's module, or of the bias (`....bias`).

    `tokens` are new words with their vectors. Of `found` tensors those in `unknown` are nothing of SDXL's.
    """

    unet: dict[str, AdapterModule] = field(default_factory=dict)
    text_encoder: dict[str, AdapterModule] = field(default_factory=dict)
    text_encoder_2: dict[str, AdapterModule] = field(default_factory=dict)
    tokens: dict[str, Vectors] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    found: int = 0

    def parts(self) -> dict[Part, dict[str, AdapterModule]]:
        return {"unet": self.unet, "text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}


def with_dora_scale(module: LoRAModule, weight: Tensor) -> LoRAModule:
    """The same change of `weight` told by dora_scale. A module without magnitude stays as it is."""
    if module.magnitude is None:
        return module
    scale = module.magnitude * _stretch(module, weight).to(module.magnitude.device)
    return replace(module, dora_scale=scale, magnitude=None)


def with_magnitude(module: LoRAModule, weight: Tensor) -> LoRAModule:
    """The same change of `weight` told by magnitude. A module without dora_scale over its rows stays as it is."""
    if module.dora_scale is None or module.dora_scale.shape[0] != weight.shape[0]:
        return module
    magnitude = module.dora_scale / _stretch(module, weight).to(module.dora_scale.device)
    return replace(module, dora_scale=None, magnitude=magnitude)


def row_lengths(weight: Tensor) -> Tensor:
    """[out, 1, ...], above zero."""
    lengths = torch.linalg.vector_norm(weight.flatten(1), dim=1).clamp_min(torch.finfo(weight.dtype).tiny)
    return lengths.reshape(-1, *[1] * (weight.dim() - 1))


def _stretch(module: LoRAModule, weight: Tensor) -> Tensor:
    """The lengths of W's rows over those of V's, float32 [out, 1, ...]."""
    base = _moved(weight, weight.device)
    return row_lengths(base) / row_lengths(base + module.scale * module.change(weight.device).reshape(weight.shape))


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
