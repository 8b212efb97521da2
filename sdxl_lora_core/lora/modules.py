"""Adapters in memory: the factors of the change of one weight, for LoRA, LoHa, LoKr and full-rank diffs.

Each changes a weight W [out, in, ...] to V = W + scale * change(). A DoRA (Liu et al., arXiv 2402.09353) then rescales
the rows of V, and files store the scale in one of two forms:

- magnitude [out, 1, ...], peft's: V times magnitude over the norms of V's rows, equation 5 of the paper;
- dora_scale, in kohya's keys, as ComfyUI and Forge apply it: [out, 1, ...] is divided by the norms of *W's* rows, and
  [1, in, ...] by those of V's columns. Where training changes the norms, the two differ by a tenth of the change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..sdxl.family import Part
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
        """The shape of the changed weight: [out, in, ...]."""
        return (self.up.shape[0], *self.down.shape[1:])

    @property
    def is_dora(self) -> bool:
        return self.dora_scale is not None or self.magnitude is not None

    @property
    def factors(self) -> Mapping[str, Tensor]:
        """The factors by kohya's names."""
        return {"lora_down.weight": self.down, "lora_up.weight": self.up}

    def change(self, device: torch.device) -> Tensor:
        """The change without the scale, float32 [out, ...]."""
        return _moved(self.up, device).flatten(1) @ _moved(self.down, device).flatten(1)


@dataclass(frozen=True, eq=False)
class LoHaModule:
    """alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b), elementwise; Hyeon-Woo et al., arXiv 2108.06098.

    `factors` by LyCORIS' names: hada_w1_a [out, rank], hada_w1_b [rank, in * ...], and the same for w2. A Tucker
    decomposition of a kernel has hada_t1 [rank, rank, h, w], and then hada_w1_a [rank, out] and hada_w1_b [rank, in].
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
        """The shape of the changed weight as far as the factors determine it: [out, in * ...] or [out, in, h, w]."""
        a, b, kernel = self.factors["hada_w1_a"], self.factors["hada_w1_b"], self.factors.get("hada_t1")
        return (a.shape[0], b.shape[1]) if kernel is None else (a.shape[1], b.shape[1], *kernel.shape[2:])

    def change(self, device: torch.device) -> Tensor:
        """The change without the scale, float32 [out, ...]."""
        return _product(self.factors, "hada", "1", device) * _product(self.factors, "hada", "2", device)


@dataclass(frozen=True, eq=False)
class LoKrModule:
    """w1 kron w2; Yeh et al., arXiv 2309.14859. The scale is alpha / rank if one of the two is factored, else 1.

    `factors` by LyCORIS' names: lokr_w1 [o1, i1] or lokr_w1_a [o1, rank] and lokr_w1_b [rank, i1]; lokr_w2 [o2, i2,
    ...] or lokr_w2_a [o2, rank] and lokr_w2_b [rank, i2 * ...]. A Tucker decomposition has lokr_t2, as LoHa's.
    """

    kind: ClassVar[str] = "LoKr"
    factors: Mapping[str, Tensor]
    alpha: float
    dora_scale: Tensor | None = None

    @property
    def rank(self) -> int:
        """0 if neither matrix is factored."""
        factored = self.factors.get("lokr_w2_b", self.factors.get("lokr_w1_b"))
        return 0 if factored is None else factored.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the changed weight as far as the factors determine it: [out, in * ...]."""
        first, second = (_product(self.factors, "lokr", number, torch.device("meta")) for number in "12")
        return (first.shape[0] * second.shape[0], first.shape[1] * second.shape[1])

    def change(self, device: torch.device) -> Tensor:
        """The change without the scale, float32 [out, ...]."""
        return torch.kron(*(_product(self.factors, "lokr", number, device) for number in "12"))


@dataclass(frozen=True, eq=False)
class DiffModule:
    """A full-rank diff: the change itself of a norm, a bias or a weight."""

    kind: ClassVar[str] = "full-rank diff"
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
        """The change without the scale, float32."""
        return _moved(self.diff, device)


AdapterModule = LoRAModule | LoHaModule | LoKrModule | DiffModule


@dataclass
class LoRAFile:
    """The content of a LoRA file: changes by the path of the weight's module, or of the bias (ending in .bias).

    `tokens` are new tokens with their vectors. `found` is the number of tensors in the file, `unknown` the keys that
    are not part of an adapter for SDXL.
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
    """The same change of `weight` with dora_scale instead of magnitude. Other modules are returned unchanged."""
    if module.magnitude is None:
        return module
    scale = module.magnitude * _norm_ratio(module, weight).to(module.magnitude.device)
    return replace(module, dora_scale=scale, magnitude=None)


def with_magnitude(module: LoRAModule, weight: Tensor) -> LoRAModule:
    """The same change of `weight` with magnitude instead of a dora_scale over rows. Others are returned unchanged."""
    if module.dora_scale is None or module.dora_scale.shape[0] != weight.shape[0]:
        return module
    magnitude = module.dora_scale / _norm_ratio(module, weight).to(module.dora_scale.device)
    return replace(module, dora_scale=None, magnitude=magnitude)


def row_norms(weight: Tensor) -> Tensor:
    """The L2 norms of the rows, [out, 1, ...], above zero."""
    norms = torch.linalg.vector_norm(weight.flatten(1), dim=1).clamp_min(torch.finfo(weight.dtype).tiny)
    return norms.reshape(-1, *[1] * (weight.dim() - 1))


def _norm_ratio(module: LoRAModule, weight: Tensor) -> Tensor:
    """The norms of W's rows over those of V's, float32 [out, 1, ...]."""
    base = _moved(weight, weight.device)
    return row_norms(base) / row_norms(base + module.scale * module.change(weight.device).reshape(weight.shape))


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
