"""Files from the core in ComfyUI's own loader: every key is applied, and to the same weights as here."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_lora_core.lora.files import write_lora
from sdxl_lora_core.lora.merge_into_weights import merge_into
from sdxl_lora_core.lora.modules import LoRAFile
from sdxl_lora_core.sdxl.base import SDXLBase, load_part
from sdxl_lora_core.sdxl.unet_names import sai_block_name
from sdxl_lora_core.text.embedding_files import write_embedding
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.model.adapters import Adapter

EVERY_LAYER = 788  # 722 of the transformers, 66 of the resnets and their samplers
EVERY_TEXT_LAYER = 6 * (12 + 32)
TENSORS = {"lora": 3, "dora": 4, "loha": 5}


@pytest.fixture
def ask_comfyui(comfyui: Path, comfyui_python: str) -> Callable[..., Any]:
    def ask(*arguments: object) -> Any:
        script = Path(__file__).with_name("lora_keys.py")
        command = [comfyui_python, str(script), *map(str, arguments)]
        done = subprocess.run(command, cwd=comfyui, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    return ask


def full_size(kind: str, empty_sdxl: dict[str, Any]) -> LoRAFile:
    """An adapter of zeros on every layer of SDXL and of its text encoders."""
    form: Any = "peft" if kind == "dora" else "kohya"  # kohya's would measure the base, which does not exist
    config = TrainConfig(adapter=kind, rank=1, target_modules="all-linear+conv", save_format=form)  # type: ignore[arg-type]
    parts = ("unet", "text_encoder", "text_encoder_2")
    return LoRAFile(**{part: zeros(Adapter(copy.deepcopy(empty_sdxl[part]), config, part), kind) for part in parts})


@pytest.fixture(autouse=True)
def kept_parameters() -> Iterator[None]:
    """Moving a module off the meta device keeps its parameters, which the adapter's groups refer to."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def zeros(adapter: Adapter, kind: str) -> dict[str, Any]:
    for layer in adapter.layers.values():
        for name, child in layer.named_children():
            if name != "base_layer":
                child.to_empty(device="cpu")
                for parameter in child.parameters():
                    torch.nn.init.zeros_(parameter)
    modules: dict[str, Any] = adapter.modules()
    if kind == "dora":
        modules = {
            name: replace(module, dora_scale=module.magnitude, magnitude=None) for name, module in modules.items()
        }
    return modules


def test_comfyui_applies_every_key(ask_comfyui: Callable[..., Any], empty_sdxl: dict[str, Any], tmp_path: Path) -> None:
    every = EVERY_LAYER + EVERY_TEXT_LAYER
    kinds = ("lora", "dora", "loha", "lokr")
    paths = [tmp_path / f"{kind}.safetensors" for kind in kinds]
    for kind, path in zip(kinds, paths, strict=True):
        write_lora(path, full_size(kind, empty_sdxl), torch.float16)
    for kind, result in zip(kinds, ask_comfyui(*paths), strict=True):
        assert (result["patches"], result["applied"]) == (every, every), kind
        assert kind not in TENSORS or result["tensors"] == TENSORS[kind] * every
        assert not [line for line in result["complaints"] if "lora" in line.lower()]


@pytest.mark.parametrize(
    "settings",
    [
        {"adapter": "lora", "rank": 3},
        {"adapter": "lora", "rank": 3, "use_rslora": True},
        {"adapter": "lora", "rank": 3, "init": "pissa", "target_modules": "all-linear"},
        {"adapter": "dora", "rank": 3},
        {"adapter": "loha", "rank": 3},
        {"adapter": "lokr", "rank": 1},
        {"adapter": "lokr", "rank": 9},
    ],
)
def test_comfyui_changes_the_weights_as_we_do(
    settings: dict[str, Any], ask_comfyui: Callable[..., Any], micro_base: SDXLBase, tmp_path: Path
) -> None:
    config = TrainConfig(**{"alpha": 5.0, "target_modules": "all-linear+conv", **settings})
    adapter = Adapter(load_part(micro_base, "unet", torch.float32), config)
    with torch.no_grad():
        for number, parameter in enumerate(adapter.groups[0].parameters):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    modules = adapter.modules()
    base, ours = (load_part(micro_base, "unet", torch.float32) for _ in range(2))
    merge_into(ours, modules, 1.0)
    lora, before, after = (tmp_path / f"{name}.safetensors" for name in ("lora", "before", "after"))
    write_lora(lora, LoRAFile(unet=modules), torch.float32)
    names = {f"diffusion_model.{sai_block_name(name)}.weight": name for name in modules}
    save_file({key: base.get_submodule(name).weight.detach() for key, name in names.items()}, before)
    assert ask_comfyui("--weights", before, after, lora)["patches"] == len(modules)
    for key, changed in load_file(after).items():
        wanted = ours.get_submodule(names[key]).weight
        assert (changed - wanted).norm() <= 1e-6 * wanted.norm(), key


def test_comfyui_puts_a_new_token_into_prompts(ask_comfyui: Callable[..., Any], tmp_path: Path) -> None:
    vectors: dict[Any, torch.Tensor] = {"text_encoder": torch.randn(2, 768), "text_encoder_2": torch.randn(2, 1280)}
    write_embedding(tmp_path / "my_lora-zwx.safetensors", vectors)
    prompt = ask_comfyui("--prompt", tmp_path, "a embedding:my_lora-zwx heart")
    plain = ask_comfyui("--prompt", tmp_path, "a heart")
    for encoder, rows in zip("lg", vectors.values(), strict=True):
        start, article, first, second, *rest = prompt[encoder]
        torch.testing.assert_close(torch.tensor([first, second]), rows)
        assert [start, article, *rest[:2]] == plain[encoder][:4]
