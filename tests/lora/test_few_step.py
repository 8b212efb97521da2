from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from sdxl_lora_core.generation import samplers
from sdxl_lora_core.lora.describe import describe_lora
from sdxl_lora_core.lora.few_step import _KINDS, advice
from sdxl_lora_core.lora.files import write_lora
from sdxl_lora_core.lora.modules import LoRAFile, LoRAModule
from tests.micro.loras import Q

# Names under which they are published.
PUBLISHED = {
    "lcm-lora-sdxl.safetensors": ("LCM", "lcm", "4 to 8", "1 to 2"),
    "LCM_LoRA_SDXL_rank1.safetensors": ("LCM", "lcm", "4 to 8", "1 to 2"),
    "lightning-4step-lora.safetensors": ("SDXL-Lightning", "euler", "4", "1"),
    "sdxl_lightning_4step_lora.safetensors": ("SDXL-Lightning", "euler", "4", "1"),
    "sdxl_lightning_8step_lora.safetensors": ("SDXL-Lightning", "euler", "8", "1"),
    "Hyper-SDXL-8steps-lora.safetensors": ("Hyper-SD", "ddim", "8", "1"),
    "Hyper-SDXL-1step-lora.safetensors": ("Hyper-SD", "tcd", "1 to 8", "1"),
    "Hyper-SDXL-12steps-CFG-lora.safetensors": ("Hyper-SD with guidance", "ddim", "12", "5 to 8"),
    "dmd2_sdxl_4step_lora_fp16.safetensors": ("DMD2", "lcm", "4", "1"),
    "TCD-SDXL-LoRA.safetensors": ("TCD", "tcd", "4 to 8", "1"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_are_known(name: str) -> None:
    found = advice(name, {})
    assert found is not None
    assert (found.kind, found.sampler, found.steps, found.guidance) == PUBLISHED[name]


@pytest.mark.parametrize(
    "name",
    [
        "hyperrealism_xl.safetensors",
        "my_style.safetensors",
        "atcd.safetensors",
        "zeus lightning bolt style.safetensors",
    ],
)
def test_others_are_left_alone(name: str) -> None:
    assert advice(name, {}) is None


def test_a_description_may_name_what_it_works_with() -> None:
    assert advice("style", {"modelspec.description": "works with SDXL-Lightning and LCM"}) is None


def test_what_is_advised_can_be_chosen() -> None:
    for _, found in _KINDS:
        assert found.sampler in get_args(samplers.Sampler) and found.scheduler in get_args(samplers.Schedule)


def test_the_info_says_it_by_name_or_metadata(tmp_path: Path) -> None:
    file = LoRAFile(unet={Q: LoRAModule(torch.ones(1, 2), torch.ones(2, 1), 1.0)})
    file.metadata = {"modelspec.title": "pytorch_lora_weights of LCM"}
    write_lora(tmp_path / "pytorch_lora_weights.safetensors", file, torch.float16)
    told = describe_lora(tmp_path / "pytorch_lora_weights.safetensors")
    assert "LCM, for few steps: sampler lcm, scheduler sgm_uniform, steps 4 to 8, guidance 1 to 2" in told
