"""Takes the pictures of the help pages, web/docs/<NodeId>.jpg, from the templates in a running ComfyUI.

    python -m tools.node_pictures http://127.0.0.1:8188 --run train_and_compare generate_with_lora_stack

Nodes of the templates after --run are shown with their results, the others as they open. Needs playwright and Chromium.
"""

from __future__ import annotations

import argparse
import io
import json
import time
import urllib.request
from pathlib import Path
from typing import Any

from PIL import Image

from tests.comfy.page import browser, open_graph, open_page
from tools.run_workflow import ROOT

WIDEST = 560  # pixels of a picture
FRAME = """(id) => {
  const node = window.app.graph.getNodeById(id);
  const view = window.app.canvas.ds;
  view.scale = 1;
  view.offset = [200 - node.pos[0], 160 - node.pos[1]]; // beside the menus
  window.app.canvas.setDirty(true, true);
  return [196, 160 - 34, node.size[0] + 8, node.size[1] + 42];
}"""

SET_STEPS = """(steps) => {
  for (const node of window.app.graph._nodes.filter((one) => one.type === "TrainSDXLLoRA"))
    node.widgets.find((widget) => widget.name === "steps").value = steps;
}"""


class Server:
    """ComfyUI's HTTP interface, as open_page needs it."""

    def __init__(self, url: str) -> None:
        self.url = url

    def post(self, path: str, body: Any) -> None:
        header = {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(self.url + path, json.dumps(body).encode(), header)).read()

    def waiting(self) -> bool:
        queue = json.load(urllib.request.urlopen(self.url + "/queue"))
        return bool(queue["queue_running"] or queue["queue_pending"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--run", nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=60, help="of the training")
    options = parser.parse_args()
    server = Server(options.url)
    with browser() as chromium:
        page = open_page(chromium, server, [], nodes_2=False)
        page.set_viewport_size({"width": 1680, "height": 1400})
        taken: set[str] = set()
        others = sorted(
            path.stem for path in (ROOT / "example_workflows").glob("*.json") if path.stem not in options.run
        )
        for name in [*options.run, *others]:
            open_graph(page, json.loads((ROOT / f"example_workflows/{name}.json").read_text(encoding="utf-8")))
            page.wait_for_timeout(1500)
            if name in options.run:
                page.evaluate(SET_STEPS, options.steps)
                run(page, server)
            take(page, taken)


def run(page: Any, server: Server) -> None:
    page.evaluate("async () => { await window.app.queuePrompt(0, 1); }")
    time.sleep(2)
    while server.waiting():
        time.sleep(1)
    page.wait_for_timeout(3000)


def take(page: Any, taken: set[str]) -> None:
    """The pictures of the nodes that have none yet."""
    nodes = page.evaluate("() => window.app.graph._nodes.map((node) => [node.id, node.type])")
    for key, kind in nodes:
        if kind in taken or not (ROOT / f"web/docs/{kind}.md").exists():
            continue
        left, top, width, height = page.evaluate(FRAME, key)
        page.wait_for_timeout(700)
        shot = page.screenshot(clip={"x": left, "y": top, "width": width, "height": min(height, 1250)})
        picture = Image.open(io.BytesIO(shot)).convert("RGB")
        picture.thumbnail((WIDEST, 1300))
        picture.save(Path(ROOT, f"web/docs/{kind}.jpg"), quality=85)
        taken.add(kind)


if __name__ == "__main__":
    main()
