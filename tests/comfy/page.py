"""ComfyUI's page in a real browser, as far as the tests need it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
READY = "window.app?.graph && window.app?.canvas && !!window.LiteGraph.registered_node_types.TrainSDXLLoRA"


@contextmanager
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        reason = "no Chromium: install it or set CHROMIUM"
        pytest.fail(reason) if os.environ.get("REQUIRE_COMFYUI") else pytest.skip(reason)
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=chromium, args=options)
        yield found
        found.close()


def open_page(browser: Any, server: Any, errors: list[str], nodes_2: bool) -> Any:
    """A page of its own, 1680 x 1000. Errors that the pack's scripts throw or log are added to `errors`."""
    server.post("/settings/Comfy.VueNodes.Enabled", nodes_2)
    server.post("/settings/Comfy.TutorialCompleted", True)
    page = browser.new_page(viewport={"width": 1680, "height": 1000})
    page.on("pageerror", lambda error: errors.append(f"{error} {error.stack}"))
    page.on("console", lambda told: errors.append(f"{told.text} {told.location}") if told.type == "error" else None)
    page.goto(server.url, wait_until="domcontentloaded", timeout=120_000)
    page.wait_for_function(READY, timeout=180_000)
    return page


def ours(errors: list[str]) -> list[str]:
    """The errors that come from the pack's scripts or about its routes.

    The page looks for a help page in its language first, and logs that there is none.
    """
    found = [error for error in errors if "sdxl-lora" in error or "sdxl_lora" in error]
    return [error for error in found if "404" not in error or "/docs/" not in error]


def open_workflow(page: Any, name: str) -> None:
    open_graph(page, json.loads((ROOT / "example_workflows" / f"{name}.json").read_text(encoding="utf-8")))


def open_template(page: Any, name: str) -> None:
    """Opens a template as the page's template browser does, at the zoom that the page chooses."""
    graph = json.loads((ROOT / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
    page.evaluate("(graph) => window.app.loadGraphData(graph, true, true, null, { openSource: 'template' })", graph)


def open_graph(page: Any, graph: dict[str, Any]) -> None:
    page.evaluate("async (graph) => { await window.app.loadGraphData(graph); }", graph)


def set_widgets(page: Any, workflow: dict[str, Any]) -> None:
    """Gives the page's nodes the widget values of an API workflow."""
    for key, node in workflow.items():
        page.evaluate(
            """([key, inputs]) => {
              for (const widget of window.app.graph.getNodeById(key).widgets ?? [])
                if (widget.name in inputs && !Array.isArray(inputs[widget.name])) widget.value = inputs[widget.name];
            }""",
            [int(key), node["inputs"]],
        )


def set_values(page: Any, kind: str, **values: Any) -> None:
    """Gives the widgets of the nodes of a class these values."""
    page.evaluate(
        """([kind, values]) => {
          for (const node of window.app.graph._nodes.filter((one) => one.type === kind))
            for (const widget of node.widgets) if (widget.name in values) widget.value = values[widget.name];
        }""",
        [kind, values],
    )


def keep_only(page: Any, *kinds: str) -> None:
    """Removes the nodes of all other classes."""
    page.evaluate(
        """(kinds) => window.app.graph._nodes
          .filter((node) => !kinds.includes(node.type)).forEach((node) => window.app.graph.remove(node))""",
        list(kinds),
    )


def run(page: Any) -> None:
    page.evaluate("async () => { await window.app.queuePrompt(0, 1); }")


def run_to_end(page: Any, server: Any, queue: Callable[[Any], object] = run) -> dict[str, Any]:
    """Queues the workflow and returns its entry in the server's history, once it has run without an error."""
    before = set(server.get("/history"))
    queue(page)
    server.wait(lambda: set(server.get("/history")) - before, 300)
    (prompt,) = set(server.get("/history")) - before
    entry = server.get(f"/history/{prompt}")[prompt]
    assert entry["status"]["status_str"] == "success", entry["status"]
    return entry
