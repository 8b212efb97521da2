"""How LoRAs are saved and merged, and how a base with LoRAs in its weights is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ..sdxl.precision import SAVE_PRECISIONS, WeightType
from ..settings import check_choice, check_range

FileFormat = Literal["kohya", "peft", "comfyui"]
MergeMethod = Literal["concatenate", "linear", "svd", "ties", "dare", "dare_ties"]
BaseLayout = Literal["single_file", "diffusers"]
FILE_FORMATS = get_args(FileFormat)
MERGE_METHODS = get_args(MergeMethod)
BASE_LAYOUTS = get_args(BaseLayout)


@dataclass(frozen=True, kw_only=True)
class SaveLoRAConfig:
    """How a LoRA is written. rank is the most that a module may have (0: as it is), energy the share that is kept."""

    lora_name: str = "my_lora"
    format: FileFormat = "kohya"
    precision: WeightType = "fp16"

    rank: int = 0
    energy: float = 1.0

    def __post_init__(self) -> None:
        check_choice(self, "format", FILE_FORMATS)
        check_choice(self, "precision", SAVE_PRECISIONS)
        check_range(self, "rank", 0, 4096)
        check_range(self, "energy", 0.01, 1)


@dataclass(frozen=True, kw_only=True)
class MergeLoRAsConfig:
    """How LoRAs become one. rank is for svd, ties and dare, density and seed for ties and dare."""

    lora_name: str = "merged_lora"
    method: MergeMethod = "concatenate"
    rank: int = 32

    density: float = 0.5
    seed: int = 0
    format: FileFormat = "kohya"
    precision: WeightType = "fp16"

    def __post_init__(self) -> None:
        check_choice(self, "method", MERGE_METHODS)
        check_choice(self, "format", FILE_FORMATS)
        check_choice(self, "precision", SAVE_PRECISIONS)
        check_range(self, "rank", 1, 4096)
        check_range(self, "density", 0.01, 1)
        check_range(self, "seed", 0, 2**64 - 1)


@dataclass(frozen=True, kw_only=True)
class SaveBaseConfig:
    """How a base with LoRAs in its weights is written."""

    base_name: str = "my_model"
    layout: BaseLayout = "single_file"
    precision: WeightType = "fp16"

    def __post_init__(self) -> None:
        check_choice(self, "layout", BASE_LAYOUTS)
        check_choice(self, "precision", SAVE_PRECISIONS)
