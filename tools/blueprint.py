"""The subgraph blueprint "Train and compare": one node that trains a LoRA and generates without and with it.

In the page's format of subgraphs (workflow 0.4): a definition, and a node that is an instance of it.
"""

from __future__ import annotations

from typing import Any

from tools.templates import Step, column, step

ID = "5c0b2f86-4d0e-4b7a-9c57-6f1d3f6a2b91"  # fixed: pages tell blueprints apart by it
INPUT, OUTPUT = -10, -20  # the page's ids for the two ends of a subgraph
PROMPTS = (
    "8-bit illustration of a red square on a sky background\n8-bit illustration of a yellow moon on a navy background"
)


def _node(class_type: str, title: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs, "_meta": {"title": title}}


def _generate(title: str, **inputs: Any) -> dict[str, Any]:
    fixed = {"negative_prompt": "", "seed": 7, "steps": 25, "guidance": 7.0, "count": 1, "cache": "use"}
    sampling = {"sampler": "dpmpp_2m", "scheduler": "karras", "prompt_per_line": True}
    shared = {"base": [str(INPUT), 0], "prompt": ["3", 0], "width": ["4", 0], "height": ["4", 0]}
    return _node("SDXLGenerateCached", title, **shared, **fixed, **sampling, **inputs)


INSIDE = {
    "1": _node("WatchOptions", "Samples", sample_every=200),
    "2": _node(
        "TrainSDXLLoRA",
        "Train",
        base=[str(INPUT), 0],
        dataset=[str(INPUT), 1],
        options=["1", 0],
        lora_name="my_lora",
        steps=1000,
        learning_rate=1e-4,
        rank=8,
        alpha=16.0,
        batch_size=1,
        seed=0,
        sample_prompts=PROMPTS,
    ),
    "3": _node("PrimitiveStringMultiline", "Prompts", value=PROMPTS),
    "4": _node("PrimitiveInt", "Size", value=1024),
    "5": _generate("With the LoRA", lora_stack=["2", 0]),
    "6": _generate("Without the LoRA"),
}
LAYOUT: tuple[Step, ...] = (
    step("Train", column("1"), column("2", width=320)),
    step("Compare", column("3", "4"), column("5"), column("6")),
)
OUTPUTS = {"lora_stack": (2, 0), "with_lora": (5, 0), "without_lora": (6, 0)}
# Inputs of the node with a widget on it: the node and the widget inside, and the type.
PROMOTED = {
    "lora_name": (2, "lora_name", "STRING"),
    "preset": (2, "preset", "COMBO"),
    "steps": (2, "steps", "INT"),
    "learning_rate": (2, "learning_rate", "FLOAT"),
    "rank": (2, "rank", "INT"),
    "sample_prompts": (2, "sample_prompts", "STRING"),
    "sample_every": (1, "sample_every", "INT"),
    "prompts": (3, "value", "STRING"),
    "size": (4, "value", "INT"),
}
INPUTS = {"base": "SDXL_BASE", "dataset": "CAPTION_DATASET"}


def inputs_node() -> dict[str, Any]:
    """The inputs of the subgraph as a node inside it, from which links start."""
    kinds = INPUTS | {name: kind for name, (_, _, kind) in PROMOTED.items()}
    return {"id": INPUT, "outputs": [{"name": name, "type": kind, "links": []} for name, kind in kinds.items()]}


def blueprint(nodes: list[dict[str, Any]], inputs: dict[str, Any], links: list[list[Any]]) -> dict[str, Any]:
    """The file's content, of the nodes inside in their places and the links between them and from `inputs`."""
    by_id = {node["id"]: node for node in nodes}
    for number, (target, widget, kind) in enumerate(PROMOTED.values(), len(INPUTS)):
        sockets = by_id[target]["inputs"]
        links.append([len(links) + 1, INPUT, number, target, len(sockets), kind])
        sockets.append({"name": widget, "type": kind, "widget": {"name": widget}, "link": len(links)})
        inputs["outputs"][number]["links"].append(len(links))
    outputs = []
    for number, (name, (source, slot)) in enumerate(OUTPUTS.items()):
        output = by_id[source]["outputs"][slot]
        links.append([len(links) + 1, source, slot, OUTPUT, number, output["type"]])
        output["links"].append(len(links))
        outputs.append({"name": name, "type": output["type"], "links": [len(links)]})
    ends = [_end(number, end) for number, end in enumerate(inputs["outputs"])]
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    right = max(node["pos"][0] + node["size"][0] for node in nodes)
    definition = {
        "id": ID,
        "version": 1,
        "state": {"lastGroupId": 0, "lastNodeId": len(nodes), "lastLinkId": len(links), "lastRerouteId": 0},
        "revision": 0,
        "config": {},
        "name": "Train and compare",
        "category": "SDXL LoRA",
        "description": "Trains an SDXL LoRA and generates the same prompts and seeds with it and without it.",
        "inputNode": {"id": INPUT, "bounding": [-260, 30, 140, 260]},
        "outputNode": {"id": OUTPUT, "bounding": [right + 100, 30, 120, 100]},
        "inputs": ends,
        "outputs": [_end(number, output) for number, output in enumerate(outputs, len(ends))],
        "widgets": [],
        "nodes": nodes,
        "groups": [],
        "links": [dict(zip(names, link, strict=True)) for link in links],
        "extra": {"workflowRendererVersion": "LG"},
    }
    return {
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [_instance(ends, outputs)],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [definition]},
        "extra": {},
    }


def _end(number: int, socket: dict[str, Any]) -> dict[str, Any]:
    """An input or output of the subgraph."""
    identity = f"{ID[:-2]}{number:02d}"
    return {"id": identity, "name": socket["name"], "type": socket["type"], "linkIds": socket["links"]}


def _instance(inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> dict[str, Any]:
    sockets = [{"name": entry["name"], "type": entry["type"], "link": None} for entry in inputs]
    shown = [
        socket | ({"widget": {"name": socket["name"]}} if socket["name"] in PROMOTED else {}) for socket in sockets
    ]
    return {
        "id": 1,
        "type": ID,
        "title": "Train and compare",
        "pos": [0, 0],
        "size": [340, 520],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": shown,
        "outputs": [{"name": entry["name"], "type": entry["type"], "links": []} for entry in outputs],
        "properties": {"proxyWidgets": [[str(node), widget] for node, widget, _ in PROMOTED.values()]},
        "widgets_values": [],
    }
