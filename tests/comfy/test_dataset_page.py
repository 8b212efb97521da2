"""Load Caption Dataset on the page: captions that are edited in place, uploads, and the list of folders."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.comfy.conftest import has_nodes_2
from tests.comfy.page import open_graph, open_page, run, run_to_end

ROOT = ".sdxl-lora-dataset"
CAPTION = f"{ROOT} figure[data-image='{{}}'] figcaption"
numbers = itertools.count()

ADD = """(folder) => {
  const { graph } = window.app;
  graph.clear();
  const data = window.LiteGraph.createNode("LoadCaptionDataset");
  const sheet = window.LiteGraph.createNode("PreviewImage");
  graph.add(data);
  graph.add(sheet);
  data.pos = [100, 150];
  sheet.pos = [900, 150];
  const values = { folder, trigger_word: "ohwx", resolution: 64 };
  for (const widget of data.widgets) if (widget.name in values) widget.value = values[widget.name];
  data.connect(1, sheet, 0);
  window.app.canvas.ds.scale = 1;
  window.app.canvas.ds.offset = [0, 0];
  window.app.canvas.setDirty(true, true);
}"""
FOLDER = """() => {
  const node = window.app.graph._nodes.find((one) => one.type === "LoadCaptionDataset");
  const widget = node.widgets.find((one) => one.name === "folder");
  return [widget.value, widget.options.values];
}"""
CHOOSE = """(values) => {
  const node = window.app.graph._nodes.find((one) => one.type === "LoadCaptionDataset");
  for (const [name, value] of Object.entries(values)) {
    const widget = node.widgets.find((one) => one.name === name);
    widget.value = value;
    widget.callback(value);
  }
}"""
DROP = """async ([files, kind]) => {
  const transfer = new DataTransfer();
  for (const [name, data] of files) {
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    transfer.items.add(new File([bytes], name));
  }
  if (kind === "panel") {
    const options = { dataTransfer: transfer, bubbles: true, cancelable: true };
    document.querySelector(".sdxl-lora-dataset").dispatchEvent(new DragEvent("drop", options));
  } else {
    const node = window.app.graph._nodes.find((one) => one.type === "LoadCaptionDataset");
    const event = { dataTransfer: transfer };
    if (!node.onDragOver(event) || !node.onDragDrop(event)) throw new Error("the node takes no files");
  }
}"""


def png(color: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (80, 60), color).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def folder(server: Any) -> Iterator[Path]:
    """A dataset: a caption, an image without one, and a file that is no image."""
    found = server.base / f"input/pictures_{next(numbers)}"
    found.mkdir()
    (found / "a.png").write_bytes(png("red"))
    (found / "a.txt").write_text("a red thing")
    (found / "b.png").write_bytes(png("blue"))
    (found / "broken.png").write_bytes(b"no image")
    yield found


@pytest.fixture
def grid(page: Any, server: Any, folder: Path) -> Any:
    """The page after a run of the node on `folder`, whose problems are shown after those of the list."""
    page.evaluate(ADD, folder.name)
    run_to_end(page, server)
    shown = f"() => document.querySelector('{ROOT} .sdxl-lora-problems').textContent.includes('broken.png')"
    page.wait_for_function(shown, timeout=60_000)
    assert page.locator(f"{ROOT} figure").count() == 3
    return page


def caption(page: Any, image: str) -> str:
    return page.text_content(CAPTION.format(image))


def edit(page: Any, image: str, text: str, *keys: str) -> None:
    page.click(CAPTION.format(image))
    area = page.locator(f"{CAPTION.format(image)} textarea")
    area.fill(text)
    for key in keys:
        area.press(key)


def wait_for_message(page: Any, text: str) -> None:
    page.wait_for_function(
        f"(text) => document.querySelector('{ROOT} .sdxl-lora-message').textContent.includes(text)",
        arg=text,
        timeout=30_000,
    )


def test_the_grid_shows_what_was_read_with_its_problems_first(grid: Any, folder: Path) -> None:
    page = grid
    assert caption(page, "a.png") == "a red thing" and caption(page, "b.png") == "ohwx (no caption file)"
    problem = page.locator(f"{ROOT} .sdxl-lora-problems > div").first
    assert problem.text_content().startswith(f"{folder.name}/broken.png: cannot be used")
    color = f"() => getComputedStyle(document.querySelector('{ROOT} .sdxl-lora-problems > div')).color"
    assert page.evaluate(color) == "rgb(255, 123, 114)"  # in one call: the list may be drawn again in between
    top = "(part) => part.getBoundingClientRect().top"
    assert problem.evaluate(top) < page.locator(f"{ROOT} figure").first.evaluate(top)
    loaded = f"() => [...document.querySelectorAll('{ROOT} img')].map((one) => one.naturalWidth).join() === '80,80,64'"
    page.wait_for_function(loaded, timeout=30_000)
    own = """() => {
      const node = window.app.graph._nodes.find((one) => one.type === "LoadCaptionDataset");
      return [node.imgs?.length ?? 0, node.serialize().widgets_values.length, node.widgets.length];
    }"""
    images, saved, widgets = page.evaluate(own)
    assert images == 0, "the sheet shows the images once more"
    assert saved < widgets, "the panels are saved with the workflow"


def test_a_chosen_folder_is_shown_before_a_run_and_in_place_of_the_last_one(page: Any, folder: Path) -> None:
    other = folder.with_name(f"{folder.name}_other")
    other.mkdir()
    (other / "z.png").write_bytes(png("green"))
    page.evaluate(ADD, folder.name)
    for chosen, images in ((folder, 3), (other, 1)):
        page.evaluate(CHOOSE, {"folder": chosen.name, "trigger_word": ""})
        shown = "([root, name, count]) => document.querySelectorAll(`${root} figure`).length === count && "
        shown += "document.querySelector(`${root} .sdxl-lora-title`).textContent.startsWith(`${name}:`)"
        page.wait_for_function(shown, arg=[ROOT, chosen.name, images], timeout=30_000)
    problem = page.text_content(f"{ROOT} .sdxl-lora-problems")
    assert problem == "1 image without a caption is skipped: click below one to write it, or give a trigger_word."
    edit(page, "z.png", "a green thing", "Enter")
    wait_for_message(page, "The caption of z.png is saved")
    assert (other / "z.txt").read_text() == "a green thing" and page.text_content(f"{ROOT} .sdxl-lora-problems") == ""
    page.evaluate(CHOOSE, {"folder": f"{folder.name}_gone"})
    wait_for_message(page, "was not found")
    assert page.locator(f"{ROOT} figure").count() == 0 and not page.is_visible(f"{ROOT} button:has-text('Undo')")


def test_the_wheel_scrolls_the_grid_and_leaves_the_zoom(page: Any, folder: Path) -> None:
    for number in range(20):
        (folder / f"more_{number}.png").write_bytes(png("green"))
    page.evaluate(ADD, folder.name)
    page.wait_for_function(f"() => document.querySelectorAll('{ROOT} figure').length === 23", timeout=30_000)
    page.click(f"{ROOT} .sdxl-lora-title")
    state = f"() => [document.querySelector('{ROOT}').scrollTop, window.app.canvas.ds.scale]"
    top, zoom = page.evaluate(state)
    page.mouse.wheel(0, 120)
    page.wait_for_function(f"() => document.querySelector('{ROOT}').scrollTop > 0", timeout=10_000)
    assert top == 0 and page.evaluate(state)[1] == zoom


def test_the_grid_is_there_for_a_folder_that_another_run_has_read(
    grid: Any, server: Any, nodes_2: bool, chromium: Any, comfyui: Path
) -> None:
    if not has_nodes_2(comfyui):
        pytest.skip("this ComfyUI sends what a cached node shows only for output nodes")
    graph = grid.evaluate("() => window.app.graph.serialize()")
    second = open_page(chromium, server, [], nodes_2)
    open_graph(second, graph)
    second.evaluate(
        "() => { window.app.graph.add(window.LiteGraph.createNode('SDXLImageCache')); }"
    )  # something to run
    run(second)
    second.wait_for_function(f"() => document.querySelectorAll('{ROOT} figure').length === 3", timeout=60_000)
    second.close()


def test_a_caption_is_edited_in_place_and_undone(grid: Any, folder: Path) -> None:
    page = grid
    edit(page, "a.png", "a dog", "Enter")
    wait_for_message(page, "The caption of a.png is saved")
    assert (folder / "a.txt").read_text() == "a dog" and caption(page, "a.png") == "a dog"
    edit(page, "b.png", "a bird")
    page.click(f"{ROOT} .sdxl-lora-title")  # which takes the focus away
    wait_for_message(page, "The caption of b.png is saved")
    assert (folder / "b.txt").read_text() == "a bird"
    for image in ("b.png", "a.png"):
        page.click(f"{ROOT} button:has-text('Undo')")
        wait_for_message(page, f"The caption of {image} is as before")
    assert (folder / "a.txt").read_text() == "a red thing" and not (folder / "b.txt").exists()
    assert caption(page, "a.png") == "a red thing" and caption(page, "b.png") == "ohwx (no caption file)"
    assert not page.is_visible(f"{ROOT} button:has-text('Undo')")


def test_a_caption_is_typed(grid: Any, folder: Path) -> None:
    page = grid
    page.click(CAPTION.format("a.png"))
    for key in ("End", "Backspace", "k", "Enter"):
        page.keyboard.press(key)
    wait_for_message(page, "The caption of a.png is saved")
    assert (folder / "a.txt").read_text() == "a red think"


def test_escape_leaves_a_caption_and_an_empty_one_is_refused(grid: Any, folder: Path) -> None:
    page = grid
    edit(page, "a.png", "never", "Escape")
    assert caption(page, "a.png") == "a red thing" and page.locator(f"{ROOT} textarea").count() == 0
    edit(page, "a.png", "", "Enter")
    wait_for_message(page, "the caption is empty")
    assert caption(page, "a.png") == "a red thing" and (folder / "a.txt").read_text() == "a red thing"


def test_an_edit_is_in_the_next_run(grid: Any, folder: Path) -> None:
    page = grid
    edit(page, "a.png", "two", "Shift+Enter", "Enter")
    wait_for_message(page, "The caption of a.png is saved")
    (folder / "broken.png").unlink()
    run(page)
    page.wait_for_function(f"() => !document.querySelector('{ROOT}').textContent.includes('broken')", timeout=60_000)
    assert caption(page, "a.png") == "two"


@pytest.mark.parametrize("kind", ["panel", "node"])
def test_dropped_files_are_uploaded_into_a_new_folder_and_chosen(grid: Any, server: Any, kind: str) -> None:
    page = grid
    data = {"x.png": png("green"), "x.txt": b"a fox", "y.py": b"import os"}
    page.evaluate(DROP, [[(name, base64.b64encode(content).decode()) for name, content in data.items()], kind])
    wait_for_message(page, "y.py: 'y.py' is not part of a dataset")
    chosen, offered = page.evaluate(FOLDER)
    assert chosen.startswith("dataset-") and chosen in offered
    made = server.base / "input" / chosen
    assert {path.name: path.read_bytes() for path in made.iterdir()} == {"x.png": png("green"), "x.txt": b"a fox"}
    run(page)
    page.wait_for_selector(CAPTION.format("x.png"), state="attached", timeout=60_000)
    assert caption(page, "x.png") == "a fox" and page.evaluate("() => window.app.graph._nodes.length") == 2


def test_a_dropped_folder_gives_the_new_one_its_name_and_keeps_its_subfolders(
    grid: Any, server: Any, tmp_path: Path
) -> None:
    page = grid
    dropped = tmp_path / f"foxes_{next(numbers)}"
    (dropped / "10_fox").mkdir(parents=True)
    (dropped / "10_fox/x.png").write_bytes(png("green"))
    (dropped / "10_fox/x.txt").write_text("a fox")
    (dropped / ".hidden").write_text("of the system")
    box = page.locator(ROOT).bounding_box()
    drop_from_desktop(page, dropped, box["x"] + box["width"] / 2, box["y"] + 10)
    wait_for_message(page, f"2 files are in {dropped.name}")
    assert page.evaluate(FOLDER)[0] == dropped.name
    made = server.base / "input" / dropped.name
    assert sorted(path.relative_to(made).as_posix() for path in made.rglob("*.*")) == ["10_fox/x.png", "10_fox/x.txt"]


def drop_from_desktop(page: Any, path: Path, x: float, y: float) -> None:
    """Drops a file or folder as the system's file manager does, for which a page cannot make the event."""
    data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
    session = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, "x": x, "y": y, "data": data})


def test_chosen_files_are_uploaded(grid: Any, server: Any) -> None:
    page = grid
    files = [{"name": f"{i}.png", "mimeType": "image/png", "buffer": png("green")} for i in range(40)]
    page.set_input_files(f"{ROOT} input[type=file]", files)
    wait_for_message(page, "40 files are in dataset-")
    chosen, _ = page.evaluate(FOLDER)
    assert len(list((server.base / "input" / chosen).iterdir())) == 40


def test_the_list_of_folders_is_refreshed(grid: Any, server: Any, folder: Path) -> None:
    page = grid
    later = f"{folder.name}_later"
    assert later not in page.evaluate(FOLDER)[1]
    (server.base / "input" / later).mkdir()
    (server.base / "input" / later / "a.png").write_bytes(png("red"))
    page.click(f"{ROOT} button:has-text('Refresh')")
    wait_for_message(page, " datasets")
    chosen, offered = page.evaluate(FOLDER)
    assert later in offered and chosen == folder.name
