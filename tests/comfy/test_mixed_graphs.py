"""Graphs of our nodes and core's in a real ComfyUI, on an SDXL that both take: what goes from one to the other."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

Graph = dict[str, dict[str, Any]]
Link = list[Any]
TEXTS = {"wanted": "a lighthouse on a cliff", "unwanted": "blurry"}
SAMPLING = {"seed": 7, "steps": 4}
SIDE = 64
CLOSE = 0.01  # relative: the server keeps core's text encoders in fp16


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def core(latent: Link, model: Link, clip: Link, **changes: Any) -> Graph:
    """From MODEL and CLIP to the latents and the picture of `core`."""
    solver = {"sampler_name": "dpmpp_2m", "scheduler": "karras", "cfg": 5.0, "denoise": 1.0, **SAMPLING, **changes}
    return {
        **LOADED,
        **{name: node("CLIPTextEncode", text=text, clip=clip) for name, text in TEXTS.items()},
        "core": node(
            "KSampler", model=model, positive=["wanted", 0], negative=["unwanted", 0], latent_image=latent, **solver
        ),
        "core latents": node("SaveLatent", samples=["core", 0], filename_prefix="latents/core"),
        "decoded": node("VAEDecode", samples=["core", 0], vae=["load", 2]),
        "core image": node("SaveImage", images=["decoded", 0], filename_prefix="core"),
    }


def ours(name: str = "ours", base: str = "narrow", **changes: Any) -> Graph:
    """Our generation with the same settings, to the latents and the picture of `name`."""
    settings = {
        "prompt": TEXTS["wanted"],
        "negative_prompt": TEXTS["unwanted"],
        "guidance": 5.0,
        "width": SIDE,
        "height": SIDE,
        "count": 1,
        "sampler": "dpmpp_2m",
        "scheduler": "karras",
        "cache": "use",
        "keep_latents": True,
        **SAMPLING,
    }
    return {
        "base": node("LoadSDXLBase", base=base, precision="fp32"),
        name: node("SDXLGenerateCached", base=["base", 0], **{**settings, **changes}),
        f"{name} latents": node("SaveLatent", samples=[name, 3], filename_prefix=f"latents/{name}"),
        f"{name} image": node("SaveImage", images=[name, 0], filename_prefix=name),
    }


def load_lora(name: str, model: float, clip: float) -> dict[str, Any]:
    return node("LoadLoRA", lora_name=name, strength_model=model, strength_clip=clip, enabled=True)


LOADED = {"load": node("CheckpointLoaderSimple", ckpt_name="narrow.safetensors")}
MODEL, CLIP = ["load", 0], ["load", 1]
EMPTY = {"empty": node("EmptyLatentImage", width=SIDE, height=SIDE, batch_size=1)}
PICTURE = {"picture": node("LoadImage", image="hole.png")}
ENCODED = {**PICTURE, "encoded": node("VAEEncode", pixels=["picture", 0], vae=["load", 2])}


class Results:
    """What a graph has left in the output folder."""

    def __init__(self, server: Any, graph: Graph) -> None:
        self._output = server.base / "output"
        self.shown: dict[str, Any] = server.run(graph, seconds=600)

    def latents(self, name: str) -> Tensor:
        return load_file(self._file(f"{name} latents", "latents"))["latent_tensor"]

    def pixels(self, name: str) -> np.ndarray:
        return np.asarray(Image.open(self._file(f"{name} image", "images"))).astype(int)

    def _file(self, node_id: str, kind: str) -> Path:
        [saved] = self.shown[node_id][kind]
        return self._output / saved["subfolder"] / saved["filename"]


def apart(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).norm() / other.norm())


@pytest.fixture(scope="module")
def narrow(server: Any, narrow_home: Path) -> Any:
    """The server with the narrow base, its LoRAs, and a picture with a hole."""
    shutil.copytree(narrow_home / "models", server.base / "models", copy_function=os.link, dirs_exist_ok=True)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    pixels = np.stack([rows * 4, columns * 4, 255 - rows * 2, np.full_like(rows, 255)], axis=-1).astype(np.uint8)
    pixels[16:48, 16:48, 3] = 0
    Image.fromarray(pixels).save(server.base / "input/hole.png")
    yield server
    server.post("/free", {"unload_models": True, "free_memory": True})
    for file in (narrow_home / "models").rglob("*"):
        if file.is_file():
            (server.base / "models" / file.relative_to(narrow_home / "models")).unlink()


def test_a_lora_saved_by_us_does_the_same_in_cores_loader(narrow: Any) -> None:
    """Core's checkpoint, LoRA loader, text encoding, sampler and decoder beside our two nodes."""
    narrow.run(
        {
            "weigh": load_lora("text.safetensors", 0.8, 0.6),
            "save": node("SaveSDXLLoRA", lora_name="mixed", format="kohya", precision="fp16", lora_stack=["weigh", 0]),
        }
    )
    lora = node(
        "LoraLoader", model=MODEL, clip=CLIP, lora_name="mixed.safetensors", strength_model=1.0, strength_clip=1.0
    )
    graph = EMPTY | core(["empty", 0], ["lora", 0], ["lora", 1]) | {"lora": lora}
    graph |= {"weigh": load_lora("mixed.safetensors", 1.0, 1.0)} | ours(lora_stack=["weigh", 0]) | ours("without")
    results = Results(narrow, graph)
    assert apart(results.latents("ours"), results.latents("core")) < CLOSE
    assert np.abs(results.pixels("ours") - results.pixels("core")).mean() < 1
    assert apart(results.latents("without"), results.latents("core")) > 10 * CLOSE, "the LoRA does nothing"


def test_our_stack_on_cores_model(narrow: Any) -> None:
    stack = load_lora("text.safetensors", 0.8, 0.6)
    apply = node("ApplyLoRAStack", model=MODEL, clip=CLIP, lora_stack=["stack", 0])
    graph = EMPTY | core(["empty", 0], ["apply", 0], ["apply", 1]) | {"stack": stack, "apply": apply}
    results = Results(narrow, graph | ours(lora_stack=["stack", 0]))
    assert "560 of 560 modules on MODEL, 264 of 264 modules on CLIP" in results.shown["apply"]["text"][0]
    assert apart(results.latents("ours"), results.latents("core")) < CLOSE
    bare = Results(narrow, EMPTY | core(["empty", 0], MODEL, CLIP))
    assert apart(bare.latents("core"), results.latents("core")) > 10 * CLOSE


def test_core_goes_on_with_our_latents(narrow: Any) -> None:
    graph = ours("start") | core(["start", 3], MODEL, CLIP, denoise=0.5) | ours(latent=["start", 3], denoise=0.5)
    results = Results(narrow, graph)
    assert apart(results.latents("ours"), results.latents("core")) < CLOSE
    assert np.abs(results.pixels("ours") - results.pixels("core")).mean() < 1
    assert apart(results.latents("start"), results.latents("core")) > 10 * CLOSE


def test_we_go_on_with_cores_latents(narrow: Any) -> None:
    graph = LOADED | ENCODED | core(["encoded", 0], MODEL, CLIP, denoise=0.5) | ours(latent=["encoded", 0], denoise=0.5)
    results = Results(narrow, graph)
    assert apart(results.latents("ours"), results.latents("core")) < CLOSE


def test_cores_empty_latents_are_no_start_at_all(narrow: Any) -> None:
    graph = EMPTY | ours(latent=["empty", 0], denoise=1.0) | ours("alone") | core(["empty", 0], MODEL, CLIP)
    results = Results(narrow, graph)
    assert torch.equal(results.latents("ours"), results.latents("alone"))
    assert apart(results.latents("ours"), results.latents("core")) < CLOSE


def test_cores_noise_mask_keeps_the_rest(narrow: Any) -> None:
    masked = node("SetLatentNoiseMask", samples=["encoded", 0], mask=["picture", 1])
    before = node("SaveLatent", samples=["encoded", 0], filename_prefix="latents/before")
    graph = LOADED | ENCODED | {"masked": masked, "before latents": before}
    graph |= core(["masked", 0], MODEL, CLIP, denoise=0.8) | ours(latent=["masked", 0], denoise=0.8)
    results = Results(narrow, graph)
    change = (results.latents("ours") - results.latents("before"))[0].abs().amax(dim=0)
    hole = np.zeros((8, 8), bool)
    hole[2:6, 2:6] = True
    assert change[~hole].max() < 1e-4 < change[hole].min()
    assert apart(results.latents("ours"), results.latents("core")) < CLOSE


def test_cores_image_and_mask(server: Any, narrow: Any) -> None:
    inputs = {"image": ["picture", 0], "denoise": 1.0, "base": "tiny-sdxl (bundled)"}
    results = Results(server, PICTURE | ours(mask=["picture", 1], **inputs) | ours("whole", **inputs))
    picture = np.asarray(Image.open(server.base / "input/hole.png").convert("RGB")).astype(int)
    outside = np.ones((SIDE, SIDE), bool)
    outside[8:56, 8:56] = False  # what the VAE mixes at the edge is left out
    kept, painted = (np.abs(results.pixels(name) - picture)[outside].mean() for name in ("ours", "whole"))
    assert kept < painted / 2
    assert np.abs(results.pixels("ours") - picture)[24:40, 24:40].mean() > kept


def test_without_keep_latents_what_hangs_on_them_does_not_run(server: Any) -> None:
    graph = ours(base="tiny-sdxl (bundled)", keep_latents=False)
    graph |= {"twice": node("LatentUpscaleBy", samples=["ours", 3], upscale_method="bilinear", scale_by=2.0)}
    graph |= {"twice latents": node("SaveLatent", samples=["twice", 0], filename_prefix="latents/twice")}
    shown = Results(server, graph).shown
    assert shown["ours"]["images"] and shown["ours image"]["images"]
    assert "ours latents" not in shown and "twice latents" not in shown
    kept = Results(server, {**graph, **ours(base="tiny-sdxl (bundled)")})
    assert kept.latents("twice").shape[-2:] == (2 * SIDE // 8, 2 * SIDE // 8)
