"""A LORA_STACK on core's MODEL and CLIP. That ComfyUI then computes the same weights: tests/comfy/test_core_lora.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdxl_lora_core.lora.files import write_lora as save_lora
from sdxl_lora_core.lora.modules import LoRAFile, LoRAModule
from sdxl_lora_core.lora.patches import comfyui_patches
from sdxl_lora_core.lora.stack import LoRARef, open_stack
from sdxl_lora_core.sdxl.base import SDXLBase
from tests.micro.images import write_lora
from tests.nodes.fake_comfyui import fake_modules
from tools.run_workflow import load_pack

PACK = load_pack()
NAMES = ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.attentions.0.proj_in")
KEYS = ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "lora_unet_middle_block_1_proj_in")


class FakePatcher:
    """Core's MODEL or CLIP as far as LoRAs are put on it."""

    def __init__(self, patches: tuple[Any, ...] = ()) -> None:
        self.model = self.cond_stage_model = None
        self.patches = patches

    def clone(self) -> FakePatcher:
        return FakePatcher(self.patches)

    def add_patches(self, patches: dict[str, Any], strength: float) -> None:
        self.patches += ((sorted(patches), strength),)


@pytest.fixture
def lora(tmp_path: Path) -> LoRARef:
    folder = tmp_path / "loras"
    folder.mkdir()
    module = LoRAModule(torch.ones(2, 4), torch.ones(4, 2), alpha=2.0)
    save_lora(folder / "one.safetensors", LoRAFile(unet=dict.fromkeys(NAMES, module)), torch.float16, "peft")
    return LoRARef(folder / "one.safetensors", "one.safetensors", 0.5, 1.0)


@pytest.fixture
def core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The keys that core's model has, which a test may take away."""
    keys = {key: f"diffusion_model.{key}" for key in KEYS}
    fake = SimpleNamespace(
        model_lora_keys_unet=lambda model, given: keys,
        model_lora_keys_clip=lambda model, given: {},
        load_lora=lambda tensors, keys, log_missing: {
            keys[name] for key in tensors if (name := key.partition(".")[0]) in keys
        },
    )
    monkeypatch.setenv("SDXL_LORA_HOME", str(tmp_path))
    fake_modules(monkeypatch, {"comfy.lora": fake})
    return keys


def apply(*stack: Any, clip: Any = None) -> tuple[Any, ...]:
    return PACK.NODE_CLASS_MAPPINGS["ApplyLoRAStack"]().apply(FakePatcher(), list(stack), clip)["result"]


def test_modules_come_by_kohyas_keys_at_their_strength(lora: LoRARef) -> None:
    (entry,) = open_stack([lora], None)
    ((tensors, strength),) = comfyui_patches(entry, ("unet",))
    assert strength == 0.5
    assert {key.partition(".")[0] for key in tensors} == set(KEYS)
    (blocks,) = open_stack([LoRARef(lora.path, lora.name, 0.5, 1.0, "mid_block=0.5, down_blocks.1=0")], None)
    ((tensors, strength),) = comfyui_patches(blocks, ("unet",))
    assert strength == 0.25 and {key.partition(".")[0] for key in tensors} == {KEYS[1]}


def test_text_encoders_have_their_own_strength(micro_base: SDXLBase, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "text.safetensors", micro_base, seed=1).path
    (entry,) = open_stack([LoRARef(path, "text", 1.0, 0.3)], None)
    ((tensors, strength),) = comfyui_patches(entry, ("text_encoder", "text_encoder_2"))
    assert strength == 0.3 and {key[:9] for key in tensors} == {"lora_te1_", "lora_te2_"}


def test_the_node_says_what_fits_and_leaves_the_model_as_it_was(core: dict[str, str], lora: LoRARef) -> None:
    model, clip, info = apply(("one.safetensors", 0.5, 1.0))
    assert model.patches == (([core[key] for key in sorted(KEYS)], 0.5),)
    assert isinstance(clip, PACK.nodes.host.comfy.Nothing)
    assert info == "one.safetensors: 2 of 2 modules on MODEL"
    given = FakePatcher()
    assert apply(("one.safetensors", 0.5, 1.0), clip=given)[1] is not given and given.patches == ()
    assert apply()[2] == "the stack is empty"
    assert apply(("one.safetensors", 0.0, 1.0))[2] == "one.safetensors: nothing for what is connected"
    del core[KEYS[1]]
    assert apply(("one.safetensors", 0.5, 1.0))[2].endswith(f"1 of 2 modules on MODEL (first missing: {KEYS[1]})")
    core.clear()
    with pytest.raises(ValueError, match="one.safetensors: none of its 2 modules is in this MODEL or CLIP"):
        apply(("one.safetensors", 0.5, 1.0))


def test_lengths_of_pefts_doras_are_refused(tmp_path: Path) -> None:
    module = LoRAModule(torch.ones(2, 4), torch.ones(4, 2), alpha=2.0, magnitude=torch.ones(4, 1))
    save_lora(tmp_path / "dora.safetensors", LoRAFile(unet={NAMES[0]: module}), torch.float32, "peft")
    (entry,) = open_stack([LoRARef(tmp_path / "dora.safetensors", "dora", 1.0, 1.0)], None)
    with pytest.raises(ValueError, match="LoRA dora is a DoRA in peft's form.*save it in the kohya format"):
        comfyui_patches(entry, ("unet",))
