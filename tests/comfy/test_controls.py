"""ControlNets in a real ComfyUI: core's Canny in front, both kinds of file, and what the server says of wrong ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sdxl_lora_core.sdxl.base import open_base
from tests.comfy.test_server import picture, seen_in
from tests.micro.controls import random_net, save_single

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def drawing(server: Any) -> Any:
    """A white disc on black in ComfyUI's input folder, and two tiny ControlNets in its controlnet folder."""
    base = open_base(ROOT / "assets/tiny-sdxl", "fp32")
    folder = server.base / "models/controlnet"
    folder.mkdir(exist_ok=True)
    save_single(folder / "edges.safetensors", random_net(base, 1))
    random_net(base, 2).save_pretrained(folder / "depth")
    adapter = ["adapter.body.0.resnets.0.block1.weight", "adapter.conv_in.weight"]
    save_file({name: torch.zeros(1) for name in adapter}, folder / "t2i.safetensors")
    rows, columns = np.mgrid[:96, :96]
    disc = ((rows - 48) ** 2 + (columns - 48) ** 2 < 900).astype(np.uint8) * 255
    Image.fromarray(disc).convert("RGB").save(server.base / "input/disc.png")
    return server


def steered(*nets: str, seed: int = 71, **changes: Any) -> dict[str, dict[str, Any]]:
    workflow = {
        **picture(seed=seed),
        "load": {"class_type": "LoadImage", "inputs": {"image": "disc.png"}},
        "edges": {
            "class_type": "Canny",
            "inputs": {"image": ["load", 0], "low_threshold": 0.1, "high_threshold": 0.3},
        },
    }
    for number, net in enumerate(nets):
        inputs = {"control_net": net, "image": ["edges", 0], "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
        inputs |= {**changes, **({"controls": [f"net{number - 1}", 0]} if number else {})}
        workflow[f"net{number}"] = {"class_type": "AddControlNet", "inputs": inputs}
        workflow["picture"]["inputs"]["controls"] = [f"net{number}", 0]
    return workflow


def test_canny_steers_the_image_and_is_found_again(drawing: Any) -> None:
    plain = drawing.run(picture(seed=71))["picture"]
    first = drawing.run(steered("edges.safetensors"))
    assert "edges: SDXL, ControlNet, " in first["net0"]["text"][0]
    assert "strength 1 from 0% to 100% of the way, by 1 image of 96x96" in first["net0"]["text"][0]
    assert seen_in(first["picture"]) != seen_in(plain)
    drawing.run(picture(seed=72))  # makes ComfyUI forget the outputs of nodes that are not in this prompt
    again = drawing.run(steered("edges.safetensors"))["picture"]
    assert "1 from the cache" in again["text"][0] and seen_in(again) == seen_in(first["picture"])
    assert seen_in(drawing.run(steered("edges.safetensors", strength=0.0))["picture"]) == seen_in(plain)


def test_two_nets_act_together_and_come_back_after_unloading(drawing: Any) -> None:
    both = steered("edges.safetensors", "depth", seed=73)
    first = drawing.run(both)["picture"]
    one = drawing.run(steered("edges.safetensors", seed=73))["picture"]
    assert seen_in(first) != seen_in(one)
    drawing.post("/free", {"unload_models": True})
    both["picture"]["inputs"]["cache"] = "refresh"
    for _ in range(2):  # ComfyUI may take the first prompt before it unloads
        assert seen_in(drawing.run(both)["picture"]) == seen_in(first)


def test_names_are_offered_and_wrong_files_refused(drawing: Any) -> None:
    info = drawing.get("/object_info/AddControlNet")["AddControlNet"]["input"]["required"]["control_net"][0]
    assert {"depth", "edges.safetensors", "t2i.safetensors"} <= set(info)
    assert "'gone' was not found: choose a .safetensors file" in drawing.refused(steered("gone"))
    assert "t2i.safetensors is a T2I-Adapter: use an SDXL ControlNet" in drawing.failure(steered("t2i.safetensors"))
    message = drawing.failure(steered("edges.safetensors", control_type="depth"))
    assert "ControlNet edges is not a ControlNet-Union: set it to auto" in message


def test_the_preview_says_who_steered_it(drawing: Any) -> None:
    (preview,) = drawing.run(steered("depth", seed=74, end_percent=0.5))["picture"]["images"]
    with Image.open(drawing.base / "temp" / preview["subfolder"] / preview["filename"]) as image:
        parameters = image.info["parameters"]
    told, _ = json.JSONDecoder().raw_decode(parameters.partition("ControlNet 0: ")[2])
    assert told.startswith("Module: none, Model: depth [") and "Guidance End: 0.5" in told
