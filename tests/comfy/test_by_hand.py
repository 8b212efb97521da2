"""A first graph with mouse and keyboard alone, as a new user makes one: search, wire, run. And the help of a node."""

from __future__ import annotations

from typing import Any

from tests.comfy.page import keep_only, open_workflow, run_to_end, set_values

# Where a slot is drawn, in pixels of the page.
SLOT = """([type, kind, name]) => {
  const { graph, canvas } = window.app;
  const node = graph._nodes.find((one) => one.type === type);
  const slots = kind === "in" ? node.inputs : node.outputs;
  const index = slots.findIndex((slot) => slot.name === name);
  const drawn = document.querySelector(`[data-slot-key="${node.id}-${kind}-${index}"]`);
  if (drawn) {
    const { x, y, width, height } = drawn.getBoundingClientRect();
    return [x + width / 2, y + height / 2];
  }
  const at = node.getConnectionPos(kind === "in", index);
  const { left, top } = canvas.canvas.getBoundingClientRect();
  return [0, 1].map((axis) => (at[axis] + canvas.ds.offset[axis]) * canvas.ds.scale + [left, top][axis]);
}"""
LINKS = """() => [...window.app.graph.links.values()].map((link) => {
  const [from, to] = [link.origin_id, link.target_id].map((id) => window.app.graph.getNodeById(id));
  return [from.type, from.outputs[link.origin_slot].name, to.type, to.inputs[link.target_slot].name];
}).sort()"""


def add(page: Any, searched: str, kind: str, x: int, y: int) -> None:
    """Adds the first node that the search finds. On the newest page it follows the mouse until a click."""
    page.mouse.dblclick(x, y)
    box = page.locator("input:focus")
    box.wait_for(timeout=30_000)
    page.keyboard.type(searched, delay=30)
    page.wait_for_timeout(2000)
    page.keyboard.press("Enter")
    page.wait_for_function(
        "(kind) => window.app.graph._nodes.some((node) => node.type === kind)", arg=kind, timeout=30_000
    )
    page.wait_for_timeout(500)
    page.mouse.move(x + 1, y + 1, steps=3)
    page.mouse.click(x + 1, y + 1)
    page.wait_for_timeout(500)


def wire(page: Any, source: tuple[str, str], target: tuple[str, str]) -> None:
    """Drags from an output to an input."""
    page.mouse.move(*page.evaluate(SLOT, [source[0], "out", source[1]]))
    page.mouse.down()
    page.mouse.move(*page.evaluate(SLOT, [target[0], "in", target[1]]), steps=10)
    page.mouse.up()
    page.wait_for_timeout(300)


def test_a_first_graph_by_hand(page: Any, server: Any) -> None:
    page.evaluate("() => { window.app.graph.clear(); window.app.canvas.ds.reset?.(); }")
    page.wait_for_timeout(500)
    add(page, "load sdxl base", "LoadSDXLBase", 120, 160)
    add(page, "load caption dataset", "LoadCaptionDataset", 120, 460)
    add(page, "train sdxl lora", "TrainSDXLLoRA", 560, 160)
    add(page, "sdxl generate", "SDXLGenerateCached", 1060, 160)
    widths = page.evaluate("() => window.app.graph._nodes.map((node) => node.size[0])")
    assert min(widths) >= 320
    wire(page, ("LoadSDXLBase", "base"), ("TrainSDXLLoRA", "base"))
    wire(page, ("LoadCaptionDataset", "dataset"), ("TrainSDXLLoRA", "dataset"))
    wire(page, ("LoadSDXLBase", "base"), ("SDXLGenerateCached", "base"))
    wire(page, ("TrainSDXLLoRA", "lora_stack"), ("SDXLGenerateCached", "lora_stack"))
    assert page.evaluate(LINKS) == [
        ["LoadCaptionDataset", "dataset", "TrainSDXLLoRA", "dataset"],
        ["LoadSDXLBase", "base", "SDXLGenerateCached", "base"],
        ["LoadSDXLBase", "base", "TrainSDXLLoRA", "base"],
        ["TrainSDXLLoRA", "lora_stack", "SDXLGenerateCached", "lora_stack"],
    ]
    set_values(page, "LoadCaptionDataset", folder="sample: 8-bit (bundled)", resolution=64)
    set_values(page, "TrainSDXLLoRA", lora_name="by_hand", steps=3, rank=2)
    set_values(page, "SDXLGenerateCached", prompt="a red circle", width=64, height=64, steps=2)
    entry = run_to_end(page, server, lambda page: page.keyboard.press("Control+Enter"))
    assert (server.base / "output/loras/by_hand.safetensors").exists()
    (images,) = [output["images"] for output in entry["outputs"].values() if "sdxl_lora_made" in output]
    assert images


SELECT = """(kind) => {
  const { graph, canvas } = window.app;
  graph.clear();
  const node = window.LiteGraph.createNode(kind);
  graph.add(node);
  node.pos = [500, 300];
  Object.assign(canvas.ds, { scale: 1, offset: [0, 0] });
  canvas.selectItems([node]);
  canvas.setDirty(true, true);
}"""
HELP = ".node-help-content"
# The texts that reach beyond the panel.
WIDE = f"""() => {{
  const panel = document.querySelector('{HELP}'), edge = panel.getBoundingClientRect().left + panel.clientWidth;
  return [...panel.querySelectorAll("*")]
    .filter((part) => !part.children.length && part.getBoundingClientRect().right > edge + 1)
    .map((part) => part.textContent.slice(0, 80)).join(" | ");
}}"""


def test_the_help_of_each_node_renders_with_its_picture_and_fits_the_panel(page: Any, server: Any) -> None:
    ours = {name: node for name, node in server.get("/object_info").items() if node["category"].startswith("SDXL LoRA")}
    too_wide = []
    for kind, node in ours.items():
        page.evaluate(SELECT, kind)
        shown = f"(title) => document.querySelector('{HELP} h1')?.textContent === title"
        if not page.evaluate(shown, node["display_name"]):  # an open panel follows the selection on some pages
            page.locator("[data-testid=info-button]").first.dispatch_event("click")
        page.wait_for_function(shown, arg=node["display_name"], timeout=60_000)
        page.wait_for_function(f"() => document.querySelector('{HELP} img')?.naturalWidth > 200", timeout=60_000)
        text = page.text_content(HELP)
        assert all(f"{name}:" in text for name in node["input_order"]["required"]) and "Common mistakes" in text
        if page.evaluate(
            f"() => document.querySelector('{HELP}').scrollWidth > document.querySelector('{HELP}').clientWidth + 1"
        ):
            too_wide.append(f"{kind} {page.evaluate(WIDE)}")
    assert " ".join(too_wide) == ""


# What of our panels does not fit its node: texts that end in an ellipsis and tables that scroll are meant to.
CUT = """() => [...document.querySelectorAll("[class^=sdxl-lora]")].flatMap((panel) => {
  const { left, right } = panel.getBoundingClientRect();
  return [panel, ...panel.querySelectorAll("*")].filter((part) => {
    const at = part.getBoundingClientRect();
    if (!at.width || part.closest("table")) return false;
    return at.left < left - 1 || at.right > right + 1 || (part.scrollWidth > part.clientWidth + 1 && part.clientWidth);
  }).map((part) => `${part.tagName}.${part.className}: ${part.textContent.slice(0, 40)}`);
})"""


def test_nodes_of_400_pixels_show_their_panels_whole(page: Any, server: Any) -> None:
    open_workflow(page, "train_and_compare")
    keep_only(page, "LoadSDXLBase", "LoadCaptionDataset", "TrainSDXLLoRA", "LoadLoRA", "SDXLGenerateCached")
    page.evaluate("""() => {
      window.app.graph._nodes.forEach((node, index) => {
        node.setSize([400, node.size[1]]);
        node.pos = [420 * index, 0];
      });
      Object.assign(window.app.canvas.ds, { scale: 0.75, offset: [100, 150] });
      window.app.canvas.setDirty(true, true);
    }""")
    set_values(page, "TrainSDXLLoRA", lora_name="a_rather_long_name_for_a_lora_of_ours", steps=4, rank=2)
    set_values(page, "LoadCaptionDataset", resolution=64)
    set_values(page, "SDXLGenerateCached", steps=2, count=2)
    run_to_end(page, server)
    page.wait_for_function("() => document.querySelectorAll('.sdxl-lora-training figure img').length", timeout=60_000)
    page.wait_for_timeout(1500)
    assert page.evaluate("() => window.app.graph._nodes.map((node) => node.size[0])") == [400] * 5
    assert page.evaluate(CUT) == []
