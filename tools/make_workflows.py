"""Writes workflows/*.json, for ComfyUI's page, from workflows/api/*.json and the node definitions.

    python -m tools.make_workflows
    python -m tools.make_workflows --thumbnails out/thumbnails    # also runs them all, for workflows/*.jpg

The API files are the source: after a change there, or of a node's inputs, run this again (a test compares the two).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tools.run_workflow import CORE_NODES, ROOT, Outputs, Workflow, load_pack, run

NOTES = {
    "train_and_compare": (
        "## Train a LoRA and see what it changed\n\n"
        "Runs as it is: a tiny SDXL and 24 sample images come with the pack. The same prompts and seeds are "
        "generated without and with the new LoRA, and CLIP scores both.\n\n"
        "**For your own images**: choose your checkpoint in *Load SDXL Base* and your folder in *Load Caption "
        "Dataset*, set its resolution and the images' width and height to 1024, and start with 1000 steps at a "
        "learning rate of 0.0001. The bundled CLIP knows only the bundled shapes: choose a real one in *CLIP Score*."
    ),
    "train_and_watch": (
        "## Watch a training and keep its best step\n\n"
        "Five of the 24 images are held out. Every 20 steps *Train SDXL LoRA* measures the loss on them and generates "
        "the sample prompts, each with a CLIP score; the node shows the samples during training. After three "
        "measurements in a row without a lower loss it stops, long before 400 steps, and saves the best step instead "
        "of the last. The learning rate is too high on purpose: the last samples show what early stopping avoids.\n\n"
        "**Cancel** it and press *Run* again: it resumes where it stopped.\n\n"
        "**For your own images**: set `validate_every` and `sample_every` to 100 or so, and `clip_model` to one that "
        "knows more than the bundled shapes, or to nothing."
    ),
    "generate_with_lora_stack": (
        "## Two LoRAs in a row\n\n"
        "Each *Load LoRA (SDXL)* adds one LoRA to the stack. Switch one off with *enabled*, or change a strength, and "
        "run again: earlier images come from the cache at once."
    ),
    "score_images": (
        "## Keep the best of many\n\n"
        "Eight images of one prompt, sorted by how well they match it. Replace the generator by *Load Image* "
        "or any other image batch to score your own images."
    ),
}
COLUMN, GAP, LINE, TEXT, PICTURE = 440, 60, 24, 110, 260  # pixels
PICTURES = ("SaveImage", "PreviewImage")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--thumbnails", type=Path, metavar="DIR", help="where the workflows run")
    home = parser.parse_args().thumbnails
    for path in sorted((ROOT / "workflows/api").glob("*.json")):
        workflow = json.loads(path.read_text(encoding="utf-8"))
        write(ROOT / "workflows" / path.name, ui_graph(workflow, NOTES[path.stem]))
        if home:
            thumbnail(workflow, run(workflow, home.absolute())).save(ROOT / f"workflows/{path.stem}.jpg", quality=90)


def thumbnail(workflow: Workflow, outputs: Outputs) -> Image.Image:
    """Rows of four: the first image of each prompt, by generator; a single generator's best first if it is scored.

    A loss chart that the workflow shows stands above them.
    """
    generators = [key for key, node in workflow.items() if node["class_type"] == "SDXLGenerateCached"]
    batches = [outputs[key][0][0] for key in generators]
    if len(generators) == 1:
        batches = [outputs[key][0][0] for key, node in workflow.items() if node["class_type"] == "CLIPScore"] or batches
    per_prompt = [workflow[key]["inputs"]["count"] if len(generators) > 1 else 1 for key in generators]
    chosen = [batch[::step][:8] for batch, step in zip(batches, per_prompt, strict=True)]
    rows = [torch.cat(list(images), dim=1) for batch in chosen for images in batch.split(4)]
    sheet = _picture(torch.cat(rows))
    for node in workflow.values():
        key, output = node["inputs"]["images"] if node["class_type"] == "PreviewImage" else ("", 0)
        if key and workflow[key]["class_type"] == "TrainSDXLLoRA":
            sheet = _above(_picture(outputs[key][output][0][0]), sheet)
    return sheet


def _picture(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().to(torch.uint8).numpy())


def _above(upper: Image.Image, lower: Image.Image) -> Image.Image:
    upper = upper.resize((lower.width, round(upper.height * lower.width / upper.width)), Image.Resampling.LANCZOS)
    both = Image.new("RGB", (lower.width, upper.height + lower.height))
    both.paste(upper, (0, 0))
    both.paste(lower, (0, upper.height))
    return both


def write(path: Path, graph: dict[str, Any]) -> None:
    path.write_text(json.dumps(graph, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def ui_graph(workflow: Workflow, note: str) -> dict[str, Any]:
    """The page's form (litegraph 0.4) of an API-format workflow."""
    classes = {**CORE_NODES, **load_pack().NODE_CLASS_MAPPINGS}
    nodes = [_node(int(key), node, classes[node["class_type"]]) for key, node in workflow.items()]
    by_id = {node["id"]: node for node in nodes}
    links: list[list[Any]] = []
    for node in nodes:
        for slot, entry in enumerate(node["inputs"]):
            source = workflow[str(node["id"])]["inputs"].get(entry["name"])
            if isinstance(source, list):
                output = by_id[int(source[0])]["outputs"][source[1]]
                links.append([len(links) + 1, int(source[0]), source[1], node["id"], slot, output["type"]])
                entry["link"] = len(links)
                output["links"].append(len(links))
    _place(nodes, links)
    nodes.append(_note(max(by_id) + 1, note))
    return {
        "last_node_id": nodes[-1]["id"],
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _node(node_id: int, node: dict[str, Any], node_class: Any) -> dict[str, Any]:
    declared = {**node_class.INPUT_TYPES()["required"], **node_class.INPUT_TYPES().get("optional", {})}
    widgets = {name: spec for name, spec in declared.items() if _is_widget(spec)}
    sockets = [name for name in declared if name not in widgets or isinstance(node["inputs"].get(name), list)]
    names = getattr(node_class, "RETURN_NAMES", node_class.RETURN_TYPES)
    return {
        "id": node_id,
        "type": node["class_type"],
        "title": node["_meta"]["title"],
        "pos": [0, 0],
        "size": [COLUMN - GAP, _height(widgets, sockets, node_class)],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [_socket(name, declared[name], name in widgets) for name in sockets],
        "outputs": [
            {"name": name, "type": kind, "links": []} for name, kind in zip(names, node_class.RETURN_TYPES, strict=True)
        ],
        "properties": {"Node name for S&R": node["class_type"]},
        "widgets_values": [value for name, spec in widgets.items() for value in _values(name, spec, node["inputs"])],
    }


def _is_widget(spec: tuple[Any, ...]) -> bool:
    return isinstance(spec[0], list) or spec[0] in WIDGETS


def _socket(name: str, spec: tuple[Any, ...], is_widget: bool) -> dict[str, Any]:
    kind = "COMBO" if isinstance(spec[0], list) else spec[0]
    return {"name": name, "type": kind, "link": None} | ({"widget": {"name": name}} if is_widget else {})


def _values(name: str, spec: tuple[Any, ...], inputs: dict[str, Any]) -> list[Any]:
    """A widget's value and, after a seed, that of the page's second widget."""
    options = spec[1] if len(spec) > 1 else {}
    value = inputs.get(name, options.get("default"))
    if isinstance(value, list):  # a link brings it; the widget keeps its default
        value = options.get("default", "")
    if options.get("control_after_generate"):
        return [value, "fixed"]
    return [value, "image"] if options.get("image_upload") else [value]


def _height(widgets: dict[str, Any], sockets: list[str], node_class: Any) -> int:
    shown = [spec[1] if len(spec) > 1 else {} for spec in widgets.values()]
    shown = [options for options in shown if not options.get("advanced")]
    rows = max(len(sockets), len(node_class.RETURN_TYPES)) + len(shown)
    rows += sum(bool(options.get("control_after_generate")) for options in shown)
    shows_images = node_class.__name__ in PICTURES or "IMAGE" in node_class.RETURN_TYPES
    shows_text = node_class.__name__ not in CORE_NODES and "TRAIN_OPTIONS" not in node_class.RETURN_TYPES
    height = 60 + rows * LINE + TEXT * sum(bool(options.get("multiline")) for options in shown)
    return height + PICTURE * shows_images + TEXT * shows_text


def _place(nodes: list[dict[str, Any]], links: list[list[Any]]) -> None:
    """Columns by distance from the start, so that links run from left to right."""
    column = {node["id"]: 1 for node in nodes}
    for _ in nodes:
        for _, source, _, target, _, _ in links:
            column[target] = max(column[target], column[source] + 1)
    bottom = dict.fromkeys(column.values(), 0)
    for order, node in enumerate(sorted(nodes, key=lambda node: column[node["id"]])):
        place = column[node["id"]]
        node["order"] = order
        node["pos"] = [place * COLUMN, bottom[place]]
        bottom[place] += node["size"][1] + GAP


def _note(node_id: int, text: str) -> dict[str, Any]:
    return {
        "id": node_id,
        "type": "MarkdownNote",
        "pos": [0, 0],
        "size": [COLUMN - GAP, 380],
        "flags": {},
        "order": node_id,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [text],
    }


if __name__ == "__main__":
    main()
