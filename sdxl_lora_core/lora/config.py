"""The settings of saving and merging LoRAs, and of saving a merged base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..files import check_name
from ..sdxl.precision import WeightType
from ..settings import MAX_SEED, Range, check_settings, setting

FileFormat = Literal["kohya", "peft", "comfyui"]
MergeMethod = Literal["concatenate", "linear", "svd", "ties", "dare", "dare_ties"]
BaseLayout = Literal["single_file", "diffusers"]
MAX_RANK = 4096

_NAME_HELP = "File name. If it is taken, a number is appended."
_FORMAT_HELP = "kohya: for every program. peft: diffusers' names. comfyui: the names of ComfyUI's modules."
_PRECISION_HELP = "fp16 is usual. fp32 keeps every bit at twice the size."


@dataclass(frozen=True, kw_only=True)
class SaveLoRAConfig:
    """How a LoRA is written."""

    lora_name: str = setting("my_lora", _NAME_HELP)
    format: FileFormat = setting("kohya", _FORMAT_HELP)
    precision: WeightType = setting("fp16", _PRECISION_HELP)
    rank: int = setting(0, "Maximum rank of a module. 0 keeps the ranks.", Range(0, MAX_RANK))
    energy: float = setting(
        1.0,
        "Fraction of each module's energy (sum of squared singular values) to keep: 0.95 finds the lowest ranks that "
        "keep 95 %.",
        Range(0.01, 1.0, step=0.01, rounded=True),
    )

    def __post_init__(self) -> None:
        check_settings(self)
        check_name("lora_name", self.lora_name, subfolders=True)


@dataclass(frozen=True, kw_only=True)
class MergeLoRAsConfig:
    """How several LoRAs are merged into one."""

    lora_name: str = setting("merged_lora", _NAME_HELP)
    method: MergeMethod = setting(
        "concatenate",
        "concatenate: exact, the ranks add up. linear: adds the factors of LoRAs of equal rank, as peft does. svd: the "
        "best approximation of the given rank. ties, dare: sparsify each LoRA first, to reduce interference.",
    )
    rank: int = setting(32, "Rank of the result of svd, ties and dare.", Range(1, MAX_RANK))
    density: float = setting(
        0.5, "Fraction of each LoRA's values that ties and dare keep.", Range(0.01, 1.0, step=0.01, rounded=True)
    )
    seed: int = setting(0, "Decides which values dare keeps.", Range(0, MAX_SEED))
    format: FileFormat = setting("kohya", _FORMAT_HELP)
    precision: WeightType = setting("fp16", _PRECISION_HELP)

    def __post_init__(self) -> None:
        check_settings(self)
        check_name("lora_name", self.lora_name, subfolders=True)


@dataclass(frozen=True, kw_only=True)
class SaveBaseConfig:
    """How a base with merged LoRAs is written."""

    base_name: str = setting("my_model", _NAME_HELP)
    layout: BaseLayout = setting(
        "single_file", "single_file: a checkpoint for every program. diffusers: a folder, written with less memory."
    )
    precision: WeightType = setting(
        "fp16", "fp16 is usual: 7 GB. bf16 has a wider range and less precision. fp32: 14 GB."
    )

    def __post_init__(self) -> None:
        check_settings(self)
        check_name("base_name", self.base_name, subfolders=True)
