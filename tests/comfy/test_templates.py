"""Every template in ComfyUI's page: whole, readable, nothing on top of another; and run in a real ComfyUI."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sdxl_lora_core.sdxl.base import open_base
from tests.comfy.conftest import has_nodes_2 as has_blueprints  # both came with 0.3.67 or later
from tests.comfy.narrow import EVERY_LAYER
from tests.comfy.page import open_template, run_to_end, set_widgets
from tests.micro.captioners import write_florence, write_pictures
from tests.micro.controls import random_net, save_single
from tests.micro.sd15 import write_micro_sd15
from tools.templates import TEMPLATES

CHECKPOINT = "checkpoints/sd_xl_base_1.0.safetensors"
LORA = "loras/sd_xl_offset_example-lora_1.0.safetensors"
SD15 = "v1-5-pruned-emaonly-fp16.safetensors"
CONTROL_NET = "controlnet/diffusers_xl_canny_full.safetensors"
KSAMPLER = "ksampler_with_lora_stack_sdxl"
ASSETS = Path(__file__).resolve().parents[2] / "assets"
SDXL = [name for name in TEMPLATES if name.endswith("_sdxl") or name == "caption_then_train"]
BUNDLED = [name for name in TEMPLATES if name not in SDXL]
LEGIBLE = 0.6  # the zoom below which the canvas draws no text
# So few steps and pixels that a CPU can run SDXL.
TINY = {"width": 64, "height": 64, "steps": 2}
SMALLER: dict[str, dict[str, Any]] = {
    "CompareLoRAs": {**TINY, "count": 1},
    "CompareVariant": {"settings": "width=64, height=64"},
    "CaptionImages": {"detail": "short"},
    "LoadCaptionDataset": {"resolution": 64, "validation_percent": 0},
    "DatasetImages": {"size": 64},
    "WatchOptions": {"sample_every": 1, "validate_every": 0, "keep_best": "off", "sample_steps": 1},
    "CaptionOptions": {"class_images": 1},
    "TrainSDXLLoRA": {"steps": 1, "sample_prompts": "a shape"},
    "SDXLGenerateCached": {**TINY, "count": 1},
    "EmptyLatentImage": {"width": 64, "height": 64},
    "KSampler": {"steps": 2},
}

# The rectangle of each node on the screen, [left, top, right, bottom] in pixels, with its title.
FRAMES = """(nodes2) => window.app.graph._nodes.map((node) => {
  const drawn = nodes2 && document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect();
  if (drawn) return [node.title, drawn.left, drawn.top, drawn.right, drawn.bottom];
  const { scale, offset } = window.app.canvas.ds;
  const [left, top] = [(node.pos[0] + offset[0]) * scale, (node.pos[1] - 30 + offset[1]) * scale];
  return [node.title, left, top, left + node.size[0] * scale, top + (node.size[1] + 30) * scale];
})"""


def overlaps(page: Any, nodes_2: bool) -> list[tuple[str, str]]:
    frames = page.evaluate(FRAMES, nodes_2)
    return [
        (one[0], other[0])
        for number, one in enumerate(frames)
        for other in frames[number + 1 :]
        if one[1] < other[3] and other[1] < one[3] and one[2] < other[4] and other[2] < one[4]
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_opens_whole_and_readable(page: Any, nodes_2: bool, shipped: dict[str, Any], name: str) -> None:
    open_template(page, name)
    missing = """() => window.app.graph._nodes.map((node) => node.type)
      .filter((type) => !window.LiteGraph.registered_node_types[type])"""
    assert page.evaluate(missing) == []
    zoom = "() => window.app.canvas.ds.scale"
    page.wait_for_function(f"() => ({zoom})() > {LEGIBLE} && ({zoom})() < 1")
    page.wait_for_timeout(500)  # Nodes 2.0 lays its nodes out after they are drawn
    assert page.evaluate(zoom) > LEGIBLE
    assert overlaps(page, nodes_2) == []
    prompt = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    assert {key: node["class_type"] for key, node in prompt.items()} == {
        key: node["class_type"] for key, node in shipped[name].items()
    }
    for key, node in shipped[name].items():
        assert {option: prompt[key]["inputs"].get(option) for option in node["inputs"]} == node["inputs"]


@pytest.mark.parametrize("name", BUNDLED)
def test_a_template_on_the_bundled_model_runs_and_its_results_cover_nothing(
    page: Any, server: Any, nodes_2: bool, shipped: dict[str, Any], shrink: Callable[..., Any], name: str
) -> None:
    open_template(page, name)
    set_widgets(page, shrink(shipped[name]))
    entry = run_to_end(page, server)
    shown = [key for key, output in entry["outputs"].items() if output.get("images")]
    page.wait_for_timeout(1500)  # for the pictures to arrive and the nodes to grow
    assert shown and overlaps(page, nodes_2) == []


@pytest.fixture
def random_sdxl(server: Any, narrow_home: Path) -> Iterator[Any]:
    """The server with a checkpoint and a LoRA of random weights, which ComfyUI takes for SDXL, by those names."""
    files = {"checkpoints/narrow.safetensors": CHECKPOINT, "loras/unet.safetensors": LORA}
    for source, target in files.items():
        (server.base / "models" / target).parent.mkdir(exist_ok=True)
        os.link(narrow_home / "models" / source, server.base / "models" / target)
    yield server
    server.post("/free", {"unload_models": True, "free_memory": True})
    for target in files.values():
        (server.base / "models" / target).unlink()


def test_the_template_for_ksampler_runs(random_sdxl: Any, shipped: dict[str, Any], shrink: Callable[..., Any]) -> None:
    workflow = shrink(shipped[KSAMPLER], **SMALLER)
    (apply,) = (key for key, node in workflow.items() if node["class_type"] == "ApplyLoRAStack")
    (save,) = (key for key, node in workflow.items() if node["class_type"] == "SaveImage")
    outputs = random_sdxl.run(workflow, 600)
    assert outputs[save]["images"] and f"{EVERY_LAYER} of {EVERY_LAYER}" in outputs[apply]["text"][0]


@pytest.fixture(scope="module")
def named(server: Any) -> Iterator[Any]:
    """The server with the tiny base and random weights by the names of the models that the templates name.

    The base is a folder of that name: LoadSDXLBase takes every single file for one of full size.
    """
    models = server.base / "models"
    base, lora, net = models / "diffusers" / Path(CHECKPOINT).name, models / LORA, models / CONTROL_NET
    sd15, captioner, images = (
        models / "diffusers" / SD15,
        models / "captioners/Florence-2-base",
        server.base / "input/my_images",
    )
    for file in (base, lora, net, captioner):
        file.parent.mkdir(exist_ok=True)
    write_micro_sd15(sd15)
    write_florence(captioner)
    write_pictures(images, 3)
    shutil.copytree(ASSETS / "tiny-sdxl", base)
    shutil.copy(ASSETS / "loras/line_style.safetensors", lora)
    save_single(net, random_net(open_base(base), seed=0))
    yield server
    for folder in (base, sd15, captioner, images):
        shutil.rmtree(folder)
    for file in (lora, net):
        file.unlink()


@pytest.mark.parametrize("name", [name for name in SDXL if name != KSAMPLER])
def test_a_template_for_sdxl_runs(named: Any, shipped: dict[str, Any], shrink: Callable[..., Any], name: str) -> None:
    workflow = shrink(shipped[name], **SMALLER)
    outputs = named.run(workflow, 600)
    for key, node in workflow.items():
        if node["class_type"] in ("SDXLGenerateCached", "SaveImage"):
            assert outputs[key]["images"]
        if node["class_type"] == "CompareLoRAs":
            rows = outputs[key]["sdxl_lora_table"][0]["rows"]
            assert [row["name"] for row in rows][-1] == "SD 1.5" and len(rows) == 3
            assert all(math.isfinite(row["mean"]) and row["deviation"] >= 0 for row in rows)
        if node["class_type"] == "CaptionImages":
            assert outputs[key]["text"][0].startswith("3 captions written")


# Adds what the blueprint needs, connects it, and makes the run short.
COMPLETE = """(settings) => {
  const { graph } = window.app;
  const [whole] = graph._nodes;
  const add = (type, x) => {
    const node = window.LiteGraph.createNode(type);
    node.pos = [x, 900];
    graph.add(node);
    return node;
  };
  const set = (node, values) => {
    const named = (name) => node.widgets.find((widget) => widget.name === name);
    for (const [name, value] of Object.entries(values)) named(name).value = value;
  };
  const [base, data] = [add("LoadSDXLBase", 0), add("LoadCaptionDataset", 400)];
  set(base, { base: "tiny-sdxl (bundled)" });
  set(data, { folder: "sample: 8-bit (bundled)", resolution: 64 });
  set(whole, settings);
  base.connect(0, whole, 0);
  data.connect(0, whole, 1);
}"""


def test_the_blueprint_is_found_by_search_and_runs(page: Any, server: Any, comfyui: Path) -> None:
    if not has_blueprints(comfyui):
        pytest.skip("this ComfyUI has no subgraph blueprints")
    assert "Train and compare" in [found["name"] for found in server.get("/global_subgraphs").values()]
    page.evaluate("() => window.app.graph.clear()")
    page.mouse.dblclick(800, 500)
    page.keyboard.type("train and compare", delay=20)
    page.get_by_text("Train and compare", exact=True).first.wait_for()
    page.keyboard.press("Enter")
    page.wait_for_function("() => window.app.graph._nodes.length === 1")
    page.mouse.click(700, 600)  # puts the node down
    short = {"lora_name": "blueprint", "steps": 2, "rank": 2, "sample_every": 1, "prompts": "a red circle", "size": 64}
    page.evaluate(COMPLETE, short)
    entry = run_to_end(page, server)
    kinds = {key: node["class_type"] for key, node in entry["prompt"][2].items()}
    one, other = (entry["outputs"][key]["images"] for key, kind in kinds.items() if kind == "SDXLGenerateCached")
    assert len(one) == len(other) == 1 and one != other
    (trained,) = (entry["outputs"][key]["text"][0] for key, kind in kinds.items() if kind == "TrainSDXLLoRA")
    assert "blueprint" in trained
