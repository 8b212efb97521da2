"""The live panel of a training, on three pages: while it trains, after a reload, in a second tab, in a subgraph."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from sdxl_lora_core.training.monitor.metrics import COLUMNS
from tests.comfy.page import (
    READY,
    keep_only,
    open_graph,
    open_page,
    open_workflow,
    ours,
    run,
    run_to_end,
    set_values,
    set_widgets,
)

SHORT = {"steps": 4, "rank": 2, "batch_size": 1, "sample_prompts": "a red circle\na blue star"}
LONG = {**SHORT, "steps": 5000, "sample_prompts": ""}
# The panel of the open graph's training: the elements of graphs that were left may still be in the page.
PANEL = """(window.app.canvas.graph ?? window.app.graph)._nodes.find((one) => one.type === "TrainSDXLLoRA")
  ?.widgets.find((one) => one.name === "sdxl_lora_training")?.element"""
HEADLINE = f"() => {PANEL}?.querySelector('.sdxl-lora-headline').textContent ?? ''"
STOP = f"[...({PANEL}?.querySelectorAll('button') ?? [])].find((one) => one.textContent === 'Stop and keep')"
PICTURES = f"() => {PANEL}?.querySelectorAll('figure img').length === 2"
OFFERED = f"() => {{ const stop = {STOP}; return !!stop && stop.style.display !== 'none'; }}"
names = (f"panel_{number}" for number in itertools.count())


def prepare(page: Any, shipped: dict[str, Any], **settings: Any) -> str:
    """Opens a workflow that only trains, at 64 px; returns the name of its LoRA."""
    name = next(names)
    open_workflow(page, "train_and_compare")
    keep_only(page, "LoadSDXLBase", "LoadCaptionDataset", "TrainSDXLLoRA")
    nodes = {key: node for key, node in shipped["train_and_compare"].items()}
    changes = {
        "TrainSDXLLoRA": {"lora_name": name, "sample_prompts": "", **settings},
        "LoadCaptionDataset": {"resolution": 64},
    }
    changed = {
        key: {"inputs": changes[node["class_type"]]} for key, node in nodes.items() if node["class_type"] in changes
    }
    set_widgets(page, changed)
    return name


def wait_for_headline(page: Any, pattern: str, seconds: int = 240) -> str:
    page.wait_for_function(
        f"(pattern) => new RegExp(pattern).test(({HEADLINE})())", arg=pattern, timeout=seconds * 1000
    )
    return page.evaluate(HEADLINE)


def panel(page: Any) -> dict[str, Any]:
    return page.evaluate(
        """(panel) => {
      const root = eval(panel);
      const canvas = root.querySelector("canvas");
      const inked = canvas.width && canvas.height
        ? canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.some((value) => value) : false;
      const node = window.app.graph._nodes.find((one) => one.type === "TrainSDXLLoRA");
      return {
        inked,
        captions: [...root.querySelectorAll("figcaption")].map((one) => one.textContent),
        loaded: [...root.querySelectorAll("figure img")].map((one) => one.complete && one.naturalWidth),
        pictures: (node?.imgs?.length ?? 0)
          + document.querySelectorAll(`[data-node-id="${node?.id}"] img:not(.sdxl-lora-training img)`).length,
      };
    }""",
        PANEL,
    )


@pytest.fixture(autouse=True)
def nothing_left_running(server: Any) -> Iterator[None]:
    yield
    server.post("/interrupt", {})
    server.wait(lambda: not server.get("/queue")["queue_running"], 120)


def test_a_training_is_followed_and_found_again_after_a_reload(page: Any, shipped: dict[str, Any]) -> None:
    name = prepare(page, shipped, **SHORT)
    saved = "() => JSON.stringify(window.app.graph.serialize().nodes.map((node) => node.widgets_values))"
    before = page.evaluate(saved)
    run(page)
    wait_for_headline(page, rf"^{name}: 4 steps$")
    page.wait_for_function(PICTURES, timeout=30_000)
    page.wait_for_timeout(1000)
    seen = panel(page)
    assert seen["inked"] and seen["captions"] == ["finished", "finished"] and all(seen["loaded"])
    assert seen["pictures"] == 0, "the node shows the chart or the samples once more"
    assert page.evaluate(saved) == before, "the panel must stay out of the saved graph"
    graph = page.evaluate("() => window.app.graph.serialize()")
    page.reload(wait_until="domcontentloaded")
    page.wait_for_function(READY, timeout=180_000)
    open_graph(page, graph)
    wait_for_headline(page, rf"^{name}: 4 steps$", 30)
    page.wait_for_function(PICTURES, timeout=30_000)
    page.wait_for_timeout(500)
    assert panel(page)["inked"]


LONG_RUN = 10_000  # steps
COUNT = """() => {
  const { prototype } = CanvasRenderingContext2D;
  const { lineTo } = prototype;
  window.drawnLines = 0;
  prototype.lineTo = function () {
    window.drawnLines += this.canvas.closest(".sdxl-lora-training") ? 1 : 0;
    lineTo.apply(this, arguments);
  };
  window.stopCounting = () => { prototype.lineTo = lineTo; };
}"""


def test_a_run_of_10000_steps_is_drawn_in_as_few_lines_as_the_chart_has_columns(
    page: Any, server: Any, shipped: dict[str, Any]
) -> None:
    name = prepare(page, shipped, **LONG)
    folder = server.base / "output/lora_runs" / name
    folder.mkdir(parents=True)
    (folder / "identity").write_text("of another program")
    rows = (f"{step},{1 / step + step % 7 / 10},{1 / step},{1e-4 * (1 - step / LONG_RUN)},,," for step in steps())
    (folder / "metrics.csv").write_text("\n".join([",".join(COLUMNS), *rows, ""]))
    graph = page.evaluate("() => window.app.graph.serialize()")
    page.evaluate(COUNT)
    open_graph(page, graph)
    wait_for_headline(page, rf"^run {name}$", 30)
    page.wait_for_function("() => window.drawnLines > 0", timeout=30_000)
    page.wait_for_timeout(500)
    assert panel(page)["inked"]
    without = page.evaluate("() => window.drawnLines = 0")
    page.evaluate(f"() => {PANEL}.querySelector('input[type=checkbox]').click()")
    page.wait_for_function("() => window.drawnLines > 0", timeout=30_000)
    page.wait_for_timeout(300)
    width = page.evaluate(f"() => {PANEL}.querySelector('canvas').clientWidth")
    # Three lines, two columns to a pixel, at most three points in a column.
    assert without == 0 and page.evaluate("() => window.drawnLines") <= 3 * 2 * 3 * width < 3 * LONG_RUN
    page.evaluate("() => window.stopCounting()")


def steps() -> range:
    return range(1, LONG_RUN + 1)


GRAY = """(panel) => {
  const canvas = eval(panel).querySelector("canvas");
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let found = 0;
  for (let at = 0; at < data.length; at += 4)
    found += data[at] === 154 && data[at + 1] === 160 && data[at + 2] === 166 && data[at + 3] > 200;
  return found;
}"""


def test_the_learning_rate_is_drawn_on_request(page: Any, shipped: dict[str, Any]) -> None:
    name = prepare(page, shipped, **{**SHORT, "sample_prompts": ""})
    run(page)
    wait_for_headline(page, rf"^{name}: 4 steps$")
    page.wait_for_timeout(500)
    without, legend = page.evaluate(GRAY, PANEL), f"() => {PANEL}.querySelector('.sdxl-lora-legend').textContent"
    assert "learning rate" not in page.evaluate(legend)
    box = f"() => {PANEL}.querySelector('input[type=checkbox]').click()"
    page.evaluate(box)
    page.wait_for_timeout(500)
    assert "learning rate" in page.evaluate(legend) and page.evaluate(GRAY, PANEL) > without + 100
    page.evaluate(box)
    page.wait_for_timeout(500)
    assert page.evaluate(GRAY, PANEL) == without


def test_texts_and_panels_are_there_again_after_another_workflow(
    page: Any, server: Any, shipped: dict[str, Any], shrink: Any
) -> None:
    open_workflow(page, "generate_with_lora_stack")
    set_widgets(page, shrink(shipped["generate_with_lora_stack"]))
    run_to_end(page, server)
    texts = """() => window.app.graph._nodes.map((node) => [node.id, (node.widgets ?? [])
      .filter((widget) => widget.name.startsWith("sdxl_lora")).map((widget) => widget.element.textContent
        + (widget.element.querySelector("textarea")?.value ?? "")).sort()]).sort()"""
    page.wait_for_function(f"() => ({texts})().filter(([, found]) => found.length).length >= 3", timeout=30_000)
    page.wait_for_timeout(1000)
    seen = page.evaluate(texts)
    page.evaluate("() => window.app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    page.wait_for_function("() => window.app.graph._nodes.length === 0", timeout=30_000)
    page.evaluate("() => window.app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
    page.wait_for_function("() => window.app.graph._nodes.length > 0", timeout=30_000)
    page.wait_for_timeout(1500)
    assert page.evaluate(texts) == seen and any(found for _, found in seen)


def test_a_sample_is_shown_in_large_and_keys_go_through_the_prompts(page: Any, shipped: dict[str, Any]) -> None:
    name = prepare(page, shipped, **SHORT)
    run(page)
    wait_for_headline(page, rf"^{name}: 4 steps$")
    page.wait_for_function(PICTURES, timeout=30_000)
    page.evaluate(f"() => {PANEL}.querySelector('figure img').click()")
    shown = "() => document.querySelector('dialog.sdxl-lora-viewer img')?.src"
    first = page.evaluate(shown)
    assert "00.png" in first
    page.keyboard.press("ArrowDown")
    assert "01.png" in page.evaluate(shown)
    page.keyboard.press("ArrowUp")
    assert page.evaluate(shown) == first
    page.keyboard.press("Escape")
    page.wait_for_function("() => !document.querySelector('dialog.sdxl-lora-viewer')", timeout=5000)


def test_stop_and_keep_from_a_second_tab(
    page: Any, server: Any, chromium: Any, nodes_2: bool, shipped: dict[str, Any]
) -> None:
    name = prepare(page, shipped, **LONG)
    run(page)
    wait_for_headline(page, r"^training: [1-9]")
    assert page.evaluate(OFFERED)
    errors: list[str] = []
    second = open_page(chromium, server, errors, nodes_2)
    open_graph(second, page.evaluate("() => window.app.graph.serialize()"))
    wait_for_headline(second, r"^training: [1-9]", 60)
    second.wait_for_function(OFFERED, timeout=10_000)
    second.evaluate(f"() => {STOP}.click()")
    for tab in (page, second):
        wait_for_headline(tab, rf"^{name}: \d+ steps$", 120)
        assert not tab.evaluate(OFFERED)
    second.close()
    assert not ours(errors)
    assert (server.base / "output/loras" / f"{name}.safetensors").exists()


def test_cancel_says_how_to_continue_and_run_continues(page: Any, server: Any, shipped: dict[str, Any]) -> None:
    prepare(page, shipped, **LONG)
    run(page)
    wait_for_headline(page, r"^training: [2-9]")
    server.post("/interrupt", {})
    said = wait_for_headline(page, r"^cancelled", 60)
    step = int(said.removeprefix("cancelled at step ").split(".")[0])
    assert step >= 2 and said == f"cancelled at step {step}. Run continues from its checkpoint."
    assert not page.evaluate(OFFERED)
    run(page)
    again = wait_for_headline(page, r"^training: \d")
    assert int(again.removeprefix("training: ").split(" ")[0]) > step
    page.evaluate(f"() => {STOP}.click()")
    wait_for_headline(page, r"steps$", 120)


def test_the_node_says_why_it_failed(page: Any, shipped: dict[str, Any]) -> None:
    prepare(page, shipped, **SHORT)
    set_values(page, "TrainSDXLLoRA", lora_name="con")
    run(page)
    assert wait_for_headline(page, "^failed") == "failed: lora_name is 'con': Windows reserves this name: use another"
    set_values(page, "TrainSDXLLoRA", lora_name=next(names))
    set_values(page, "LoadCaptionDataset", resolution=100)
    run(page)
    text = """() => window.app.graph._nodes.find((one) => one.type === "LoadCaptionDataset")
      .widgets.find((one) => one.name === "sdxl_lora_text")?.element.firstChild.value ?? ''"""
    page.wait_for_function(f"() => ({text})().startsWith('failed: resolution is 100')", timeout=60_000)


def test_a_new_run_begins_empty(page: Any, shipped: dict[str, Any]) -> None:
    prepare(page, shipped, **SHORT)
    run(page)
    wait_for_headline(page, r": 4 steps$")
    page.wait_for_function(PICTURES, timeout=30_000)
    train = next(key for key, node in shipped["train_and_compare"].items() if node["class_type"] == "TrainSDXLLoRA")
    set_widgets(page, {train: {"inputs": {**LONG, "lora_name": next(names)}}})
    run(page)
    wait_for_headline(page, r"^training: [1-9]")
    assert panel(page)["captions"] == []


def test_a_training_inside_a_subgraph(page: Any, server: Any, shipped: dict[str, Any]) -> None:
    name = prepare(page, shipped, **LONG)
    page.evaluate("""() => {
      const graph = window.app.graph;
      const node = graph._nodes.find((one) => one.type === "TrainSDXLLoRA");
      graph.convertToSubgraph(new Set([node]));
    }""")
    run(page)
    server.wait(lambda: "training:" in server.text().rpartition("got prompt")[2], 120)
    status = server.get("/sdxl_lora/status")[-1]
    assert ":" in status["node"] and status["state"] == "running"
    page.evaluate("""() => {
      const outer = window.app.graph._nodes.find((one) => one.subgraph);
      window.app.canvas.openSubgraph ? window.app.canvas.openSubgraph(outer.subgraph, outer)
        : window.app.canvas.setGraph(outer.subgraph);
    }""")
    wait_for_headline(page, r"^training: [1-9]", 60)
    page.evaluate(f"() => {STOP}.click()")
    wait_for_headline(page, rf"^{name}: \d+ steps$", 120)
