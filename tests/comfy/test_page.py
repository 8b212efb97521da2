"""The shipped workflows in ComfyUI's page, in a real browser."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.comfy.page import open_graph, open_workflow, run_to_end, set_widgets

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = ["generate_with_lora_stack", "score_images", "train_and_compare", "train_and_watch"]
VISIBLE = {  # widgets on the face of each node: what is not advanced
    "LoadCaptionDataset": 4,
    "LoadSDXLBase": 2,
    "WatchOptions": 12,
    "TrainSDXLLoRA": 9,
    "LoadLoRA": 4,
    "SDXLGenerateCached": 11,
    "CLIPScore": 1,  # the prompt comes by a link
}

# The number of widgets that a node shows, without those that a link stands in for and those of the pack's own.
FACES = """(nodes2) => window.app.graph._nodes.map((node) => {
  const linked = (name) => node.inputs?.some((input) => input.widget?.name === name && input.link != null);
  const drawn = nodes2
    ? [...document.querySelectorAll(`[data-node-id="${node.id}"] [data-testid="node-widget"]`)]
        .map((element) => element.dataset.widgetName)
    : (node.widgets ?? []).filter((widget) => node.isWidgetVisible(widget)).map((widget) => widget.name);
  const other = (name) => linked(name) || name.startsWith("sdxl_lora") || name === "control_after_generate";
  return [node.type, drawn.filter((name) => !other(name)).length];
})"""


# The widgets on the face of a new node, and what it shows of the text that it gives.
NEW_NODE = """(name) => {
  const node = window.LiteGraph.createNode(name);
  window.app.graph.add(node);
  const hidden = (widget) => node.isWidgetVisible ? !node.isWidgetVisible(widget) : widget.advanced;
  const face = (node.widgets ?? [])
    .filter((widget) => !hidden(widget) && !widget.name.startsWith("sdxl_lora")).map((widget) => widget.name);
  node.onExecuted?.({ text: ["what it did"] });
  const text = node.widgets?.find((widget) => widget.name === "sdxl_lora_text")?.element.firstChild.value;
  window.app.graph.remove(node);
  return [face, text];
}"""


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflow_opens_with_the_right_values(page: Any, shipped: dict[str, Any], name: str) -> None:
    open_workflow(page, name)
    missing = "() => window.app.graph._nodes.filter((node) => node.has_errors).map((node) => node.type)"
    assert page.evaluate(missing) == []
    prompt = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    assert set(prompt) == set(shipped[name])
    for key, node in shipped[name].items():
        assert prompt[key]["class_type"] == node["class_type"]
        assert {name: prompt[key]["inputs"].get(name) for name in node["inputs"]} == node["inputs"]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_advanced_inputs_are_hidden(page: Any, nodes_2: bool, name: str) -> None:
    open_workflow(page, name)
    page.wait_for_timeout(500)
    faces = [(kind, count) for kind, count in page.evaluate(FACES, nodes_2) if kind in VISIBLE]
    assert faces == [(kind, VISIBLE[kind]) for kind, _ in faces] and faces


def test_every_node_hides_its_advanced_inputs_and_shows_its_text(page: Any, server: Any) -> None:
    ours = {name: node for name, node in server.get("/object_info").items() if node["category"].startswith("SDXL LoRA")}
    assert len(ours) >= 18
    for name, node in ours.items():
        inputs = {**node["input"]["required"], **node["input"].get("optional", {})}
        advanced = {key for key, (_, *options) in inputs.items() if options and options[0].get("advanced")}
        face, text = page.evaluate(NEW_NODE, name)
        assert not advanced & set(face), f"{name} shows {advanced & set(face)}"
        assert set(face) - {"control_after_generate"} <= set(inputs) - advanced
        assert text == "what it did", name


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflow_runs_from_the_page(
    page: Any, nodes_2: bool, server: Any, shipped: dict[str, Any], shrink: Callable[..., Any], name: str
) -> None:
    open_workflow(page, name)
    set_widgets(page, shrink(shipped[name]))
    entry = run_to_end(page, server)
    page.evaluate("""() => { const view = window.app.canvas.ds; view.scale = 0.25; view.offset = [0, 100];
      window.app.canvas.setDirty(true, true); }""")  # pictures are loaded for nodes in sight
    for node_id, output in entry["outputs"].items():
        shown = """([id, count, nodes2]) => {
          const node = window.app.graph.getNodeById(id);
          const expected = ["TrainSDXLLoRA", "LoadCaptionDataset"].includes(node.type) ? 0 : count; // panels show them
          const drawn = [...document.querySelectorAll(`[data-node-id="${id}"] img`)]
            .filter((one) => !one.closest("[class^=sdxl-lora]"));
          if (nodes2) return expected ? drawn.length > 0 : drawn.length === 0; // several may be a gallery
          const covered = node.widgets?.slice(0, -1).some((widget) => widget.name === "$$canvas-image-preview");
          return (node.imgs?.length ?? 0) === expected && !covered;
        }"""
        arguments = [int(node_id), len(output.get("images", [])), nodes_2]
        page.wait_for_function(shown, arg=arguments, timeout=30_000)
    texts = """() => window.app.graph._nodes
      .flatMap((node) => node.widgets ?? []).filter((widget) => widget.name === "sdxl_lora_text")
      .map((widget) => widget.element.firstChild.value)"""
    page.wait_for_function(f"({texts})().length >= 2", timeout=30_000)
    assert all(page.evaluate(texts)), "a node shows an empty text"
    serialized = "() => window.app.graph.serialize().nodes.map((node) => [node.id, node.widgets_values ?? []])"
    saved = page.evaluate(serialized)
    graph = json.loads((ROOT / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
    counts = {node["id"]: len(node["widgets_values"]) for node in graph["nodes"]}
    assert {key: len(values) for key, values in saved} == counts, "the text must stay out of the saved graph"


ORDER = """(nodes2) => {
  const node = window.app.graph._nodes.find((one) => one.type === "TrainSDXLLoRA");
  const drawn = [...document.querySelectorAll(`[data-node-id="${node.id}"] [data-testid="node-widget"]`)];
  return nodes2 ? drawn.map((one) => one.dataset.widgetName) : node.widgets.map((widget) => widget.name);
}"""


def test_the_preset_is_shown_first_and_saved_where_it_was(page: Any, nodes_2: bool, shipped: dict[str, Any]) -> None:
    graph = json.loads((ROOT / "tests/saved/page/2026-11_train_and_compare.json").read_text(encoding="utf-8"))
    open_graph(page, graph)
    page.wait_for_timeout(500)
    assert page.evaluate(ORDER, nodes_2)[:2] == ["preset", "lora_name"]
    saved = {node["id"]: node.get("widgets_values") for node in graph["nodes"] if node["type"] == "TrainSDXLLoRA"}
    again = page.evaluate("() => window.app.graph.serialize().nodes.map((node) => [node.id, node.widgets_values])")
    assert saved and {key: values for key, values in again if key in saved} == saved
    prompt = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    for key, values in saved.items():
        assert prompt[str(key)]["inputs"]["preset"] == values[-1]
