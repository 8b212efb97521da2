"""LoRAs that ComfyUI's own node Extract and Save Lora writes, in our reader: every key, with its effect."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdxl_lora_core.lora.files import read_lora
from sdxl_lora_core.lora.merge_into_weights import merge_into
from tests.micro.deep import PARTS, deep_parts, layer, sai_layers, sai_norms, text_layers, worst_error

ENCODERS = {"clip_l.transformer.": "text_encoder", "clip_g.transformer.": "text_encoder_2"}


def differences(parts: dict[str, Any]) -> dict[str, Tensor]:
    """A random change of every weight and bias, half of them by no more than rank 2 has room for."""
    draw = torch.Generator().manual_seed(0)
    named = {f"{sai}.{leaf}": layer(parts["unet"], path) for leaf in ("weight", "bias") for sai, path in unet_modules()}
    for prefix, part in ENCODERS.items():
        for leaf in ("weight", "bias"):
            named |= {f"{prefix}{path}.{leaf}": layer(parts[part], path) for path in text_layers(part)}
    tensors = {key: getattr(module, key.rpartition(".")[2]) for key, module in named.items()}
    return {key: torch.randn(old.shape, generator=draw) * 0.1 for key, old in tensors.items() if old is not None}


def unet_modules() -> list[tuple[str, str]]:
    return [*sai_layers().items(), *sai_norms().items()]


@pytest.mark.parametrize(("kind", "factored"), [("standard", 794 + 264), ("full_diff", 0)])
def test_every_key_has_its_effect(kind: str, factored: int, comfyui: Path, comfyui_python: str, tmp_path: Path) -> None:
    parts = deep_parts()
    given, saved = tmp_path / "differences.safetensors", tmp_path / "saved.safetensors"
    changes = differences(parts)
    save_file(changes, given)
    script = Path(__file__).with_name("lora_keys.py")
    command = [comfyui_python, str(script), "--save", str(given), str(saved), kind]
    done = subprocess.run(command, cwd=comfyui, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"given": len(changes), "taken": len(changes)}

    file = read_lora(saved)
    assert file.unknown == ()
    assert sum(map(len, file.parts().values())) == len(changes)
    assert sum(module.kind == "LoRA" for modules in file.parts().values() for module in modules.values()) == factored
    wanted = merged_by_hand(parts, load_file(saved))
    for part, modules in file.parts().items():
        assert not merge_into(parts[part], modules, 1.0).missing
        assert worst_error(parts[part], wanted[part]) <= 1e-6


def merged_by_hand(parts: dict[str, Any], saved: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """W + B A, or W + the difference, in float64, by ComfyUI's names."""
    wanted: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for key, tensor in saved.items():
        stem, _, role = key.partition(".lora_") if ".lora_" in key else key.rpartition(".")
        if role == "down.weight":
            continue
        part, path = place(stem)
        leaf = "bias" if role == "diff_b" else "weight"
        old = getattr(layer(parts[part], path), leaf).detach().double()
        change = tensor.double()
        if role == "up.weight":
            change = change.flatten(1) @ saved[f"{stem}.lora_down.weight"].double().flatten(1)
        wanted[part][f"{path}.{leaf}"] = old + change.reshape(old.shape)
    return wanted


def place(stem: str) -> tuple[str, str]:
    if stem.startswith("diffusion_model."):
        return "unet", dict(unet_modules())[stem.removeprefix("diffusion_model.").replace(".", "_")]
    name = stem.removeprefix("text_encoders.")
    prefix = next(prefix for prefix in ENCODERS if name.startswith(prefix))
    return ENCODERS[prefix], name.removeprefix(prefix)
