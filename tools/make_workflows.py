"""Writes example_workflows/*.json, for ComfyUI's page, from example_workflows/api/*.json and the node definitions.

    python -m tools.make_workflows
    python -m tools.make_workflows --thumbnails out/thumbnails    # also runs them all, for example_workflows/*.jpg

The API files are the source: after a change there, or of a node's inputs, run this again (a test compares the two).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tools.blueprint import INSIDE, LAYOUT, blueprint, inputs_node
from tools.layout import Routes, groups, place, view
from tools.run_workflow import CORE_NODES, ROOT, Workflow, load_pack, run
from tools.templates import TEMPLATES, Step
from tools.thumbnails import bundled_twin, thumbnail

FOLDER = ROOT / "example_workflows"
BLUEPRINT = ROOT / "subgraphs/Train and compare.json"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN")
# Heights in pixels, each the largest of the three pages.
ROW, SOCKET, TEXT_BOX, FOOT, MORE = 30, 20, 100, 36, 30
REPORT, PICTURE = 96, 220  # what our nodes show after they ran
PANELS = {
    "TrainSDXLLoRA": 380,  # with the pictures
    "LoadCaptionDataset": 266,  # in place of the picture
    "LoadLoRA": 140,
    "SDXLGenerateCached": PICTURE + 60,
    "CLIPScore": PICTURE + 190,
    "StackReport": PICTURE,  # a wide chart
    "ImageSimilarity": PICTURE + 150,
    "FilterByScore": PICTURE,
    "CompareLoRAs": PICTURE + 190,
    "PickCheckpoint": PICTURE + 190,
    "FindStrength": PICTURE + 190,
    "DatasetReport": PICTURE,
    "HumanCompare": PICTURE + 190,
    "CaptionImages": 180,
}
PICTURES = ("SaveImage", "PreviewImage")
SDXL = "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/resolve/main"
SD15 = "https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main"
CONTROL = "https://huggingface.co/lllyasviel/sd_control_collection/resolve/main"
FILES = {  # of the templates for real SDXL: for each model that a widget names, where it is from and its folder
    "sd_xl_base_1.0.safetensors": (SDXL, "checkpoints"),
    "v1-5-pruned-emaonly-fp16.safetensors": (SD15, "checkpoints"),
    "sd_xl_offset_example-lora_1.0.safetensors": (SDXL, "loras"),
    "diffusers_xl_canny_full.safetensors": (CONTROL, "controlnet"),
}


OWN = ("my_images", "Florence-2-base")  # folders that users have by names of their own


def _declared(inputs: dict[str, Any], outputs: dict[str, str]) -> type:
    """A stand-in for a node of ComfyUI that only the page runs."""
    declared = {"required": {name: spec if isinstance(spec, tuple) else (spec, {}) for name, spec in inputs.items()}}
    names = {"RETURN_TYPES": tuple(outputs.values()), "RETURN_NAMES": tuple(outputs)}
    return type("ComfyUINode", (), {"INPUT_TYPES": classmethod(lambda _: declared), **names})


_TEXT = ("STRING", {"multiline": True})
_SEED = ("INT", {"control_after_generate": True})
ONLY_IN_COMFYUI = {
    "CheckpointLoaderSimple": _declared({"ckpt_name": ([], {})}, {"MODEL": "MODEL", "CLIP": "CLIP", "VAE": "VAE"}),
    "CLIPTextEncode": _declared({"text": _TEXT, "clip": "CLIP"}, {"CONDITIONING": "CONDITIONING"}),
    "EmptyLatentImage": _declared(dict.fromkeys(("width", "height", "batch_size"), "INT"), {"LATENT": "LATENT"}),
    "KSampler": _declared(
        {
            "model": "MODEL",
            "seed": _SEED,
            "steps": "INT",
            "cfg": "FLOAT",
            "sampler_name": ([], {}),
            "scheduler": ([], {}),
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "latent_image": "LATENT",
            "denoise": "FLOAT",
        },
        {"LATENT": "LATENT"},
    ),
    "VAEDecode": _declared({"samples": "LATENT", "vae": "VAE"}, {"IMAGE": "IMAGE"}),
    "PrimitiveStringMultiline": _declared({"value": _TEXT}, {"STRING": "STRING"}),
    "PrimitiveInt": _declared({"value": _SEED}, {"INT": "INT"}),
    "Canny": _declared({"image": "IMAGE", "low_threshold": "FLOAT", "high_threshold": "FLOAT"}, {"IMAGE": "IMAGE"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--thumbnails", type=Path, metavar="DIR", help="where the workflows run")
    parser.add_argument("--only", nargs="*", default=list(TEMPLATES), metavar="NAME", help="the templates to write")
    arguments = parser.parse_args()
    write(BLUEPRINT, train_and_compare_blueprint())
    for name in arguments.only:
        workflow = json.loads((FOLDER / f"api/{name}.json").read_text(encoding="utf-8"))
        write(FOLDER / f"{name}.json", ui_graph(workflow, TEMPLATES[name]))
        if home := arguments.thumbnails:
            twin = bundled_twin(workflow)
            thumbnail(twin, run(twin, home.absolute() / name)).save(FOLDER / f"{name}.jpg", quality=88)


def write(path: Path, graph: dict[str, Any]) -> None:
    path.write_text(json.dumps(graph, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def ui_graph(workflow: Workflow, steps: tuple[Step, ...]) -> dict[str, Any]:
    """The page's form (litegraph 0.4) of an API-format workflow."""
    nodes = page_nodes(workflow)
    links = connect(workflow, nodes, nodes)
    columns = place(steps, nodes)
    for order, node in enumerate(node for column in columns for node in column):
        node["order"] = order
    routes = Routes(columns, links, first_step=len(steps[0].columns))
    frames = groups(steps, columns, len(routes.above), len(routes.below))
    led = {"reroutes": routes.points, "linkExtensions": routes.ends} if routes.points else {}
    return {
        "last_node_id": nodes[-1]["id"],
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": frames,
        "config": {},
        "extra": {"ds": view(frames), **led},
        "version": 0.4,
    }


def train_and_compare_blueprint() -> dict[str, Any]:
    """The subgraph that newer pages offer in their node library."""
    nodes, inputs = page_nodes(INSIDE), inputs_node()
    links = connect(INSIDE, nodes, [*nodes, inputs])
    place(LAYOUT, nodes)
    return blueprint(nodes, inputs, links)


def page_nodes(workflow: Workflow) -> list[dict[str, Any]]:
    classes = {**ONLY_IN_COMFYUI, **CORE_NODES, **load_pack().NODE_CLASS_MAPPINGS}
    return [_node(int(key), node, classes[node["class_type"]]) for key, node in workflow.items()]


def connect(workflow: Workflow, nodes: list[dict[str, Any]], sources: list[dict[str, Any]]) -> list[list[Any]]:
    """Connects the sockets of `nodes` to outputs of `sources`; each link is id, node, socket, node, socket, type."""
    by_id = {node["id"]: node for node in sources}
    links: list[list[Any]] = []
    for node in nodes:
        for slot, entry in enumerate(node["inputs"]):
            source = workflow[str(node["id"])]["inputs"].get(entry["name"])
            if isinstance(source, list):
                output = by_id[int(source[0])]["outputs"][source[1]]
                links.append([len(links) + 1, int(source[0]), source[1], node["id"], slot, output["type"]])
                entry["link"] = len(links)
                output["links"].append(len(links))
    return links


def _node(node_id: int, node: dict[str, Any], node_class: Any) -> dict[str, Any]:
    declared = {**node_class.INPUT_TYPES()["required"], **node_class.INPUT_TYPES().get("optional", {})}
    widgets = {name: spec for name, spec in declared.items() if is_widget(spec)}
    sockets = [name for name in declared if name not in widgets or isinstance(node["inputs"].get(name), list)]
    names = getattr(node_class, "RETURN_NAMES", node_class.RETURN_TYPES)
    models = [{"name": name, "url": f"{FILES[name][0]}/{name}", "directory": FILES[name][1]} for name in _files(node)]
    return {
        "id": node_id,
        "type": node["class_type"],
        "title": node["_meta"]["title"],
        "pos": [0, 0],
        "size": [0, _height(node, widgets, sockets, node_class)],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [_socket(name, declared[name], name in widgets) for name in sockets],
        "outputs": [
            {"name": name, "type": kind, "links": []} for name, kind in zip(names, node_class.RETURN_TYPES, strict=True)
        ],
        "properties": {"Node name for S&R": node["class_type"]} | ({"models": models} if models else {}),
        "widgets_values": [value for name, spec in widgets.items() for value in _values(name, spec, node["inputs"])],
    }


def _files(node: dict[str, Any]) -> list[str]:
    return [value for value in node["inputs"].values() if isinstance(value, str) and value in FILES]


def is_widget(spec: tuple[Any, ...]) -> bool:
    kind, *options = spec
    forced = bool(options and options[0].get("forceInput"))
    return not forced and (isinstance(kind, list) or kind in WIDGETS)


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


def _height(node: dict[str, Any], widgets: dict[str, Any], sockets: list[str], node_class: Any) -> int:
    shown = {name: spec[1] if len(spec) > 1 else {} for name, spec in widgets.items()}
    face = {name: options for name, options in shown.items() if not options.get("advanced")}
    boxes = sum(bool(options.get("multiline")) and name not in sockets for name, options in face.items())
    height = SOCKET * max(len(set(sockets) - set(widgets)), len(node_class.RETURN_TYPES))
    height += ROW * (len(face) - boxes) + TEXT_BOX * boxes + FOOT + MORE * (len(face) < len(shown))
    return height + _results_height(node["class_type"], node_class)


def _results_height(node_id: str, node_class: Any) -> int:
    """What a node shows of its results: a report, pictures, or a panel."""
    if node_id not in load_pack().NODE_CLASS_MAPPINGS:
        return PICTURE * (node_id in PICTURES)
    report = REPORT * ("TRAIN_OPTIONS" not in node_class.RETURN_TYPES)
    return report + PANELS.get(node_id, PICTURE * ("IMAGE" in node_class.RETURN_TYPES))


if __name__ == "__main__":
    main()
