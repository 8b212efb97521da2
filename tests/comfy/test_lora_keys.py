"""A full-size LoRA from the core in ComfyUI's own loader: every key has to be applied."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import torch

import sdxl_lora_core
from sdxl_lora_core.lora_files import LoRAFile, LoRAModule, write_lora

DATA = Path(sdxl_lora_core.__file__).parent / "data"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def test_comfyui_applies_every_key(comfyui: Path, comfyui_python: str, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(DATA / "unet", local_files_only=True))
    modules = {
        name: LoRAModule(torch.zeros(1, layer.in_features), torch.zeros(layer.out_features, 1), alpha=1.0)
        for name, layer in unet.named_modules()
        if isinstance(layer, torch.nn.Linear) and name.endswith(ATTENTION)
    }
    path = tmp_path / "full.safetensors"
    file = LoRAFile(unet=modules, text_encoder={}, text_encoder_2={}, metadata={}, unknown=())
    write_lora(path, file, torch.float16)
    script = Path(__file__).with_name("lora_keys.py")
    done = subprocess.run(
        [comfyui_python, str(script), str(path)], cwd=comfyui, capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == {"tensors": 1680, "patches": 560, "applied": 560, "complaints": result["complaints"]}
    assert not [line for line in result["complaints"] if "lora" in line.lower()]
