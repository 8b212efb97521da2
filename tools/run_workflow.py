"""Runs an API-format workflow with this pack's nodes where ComfyUI is absent.

    python tools/run_workflow.py example_workflows/api/train_and_compare.json --output out/demo --set 3.steps=100

Knows this pack's nodes, LoadImage, PreviewImage and SaveImage. It does not replace ComfyUI.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
log = logging.getLogger("sdxl_lora")

Workflow = dict[str, dict[str, Any]]
Outputs = dict[str, tuple[list[Any], ...]]  # as in ComfyUI every output is a list of values
OnNode = Callable[[str, str], None]


def load_pack(folder: Path = ROOT) -> ModuleType:
    """The pack as ComfyUI loads it: a package whose name has nothing to do with the folder's."""
    name = "sdxl_lora_nodes_pack"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec and spec.loader
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


class LoadImage:
    RETURN_TYPES = ("IMAGE", "MASK")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": ("STRING", {})}}

    def load(self, image: str) -> tuple[torch.Tensor, None]:
        pixels = np.asarray(Image.open(_home() / "input" / image).convert("RGB"))
        return torch.from_numpy(pixels.copy()).float()[None] / 255, None


class SaveImage:
    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"images": ("IMAGE",), "filename_prefix": ("STRING", {"default": "ComfyUI"})}}

    def save(self, images: torch.Tensor, filename_prefix: str) -> tuple[()]:
        for number, image in enumerate(images, 1):
            path = _home() / f"{filename_prefix}_{number:05d}_.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 255).round().to(torch.uint8).numpy()).save(path)
        return ()


class PreviewImage(SaveImage):
    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"images": ("IMAGE",)}}

    def save(self, images: torch.Tensor, filename_prefix: str = "temp/preview") -> tuple[()]:
        return super().save(images, filename_prefix)


CORE_NODES: dict[str, type] = {"LoadImage": LoadImage, "SaveImage": SaveImage, "PreviewImage": PreviewImage}


def _home() -> Path:
    return Path(os.environ["SDXL_LORA_HOME"])


def run(workflow: Workflow, home: Path, on_node: OnNode = lambda node_id, title: None) -> Outputs:
    """Runs every node once, in order of the links. Returns each node's outputs by node id.

    `home` receives results and has input/, models/ and the caches. Raises ValueError for a workflow that cannot run.
    """
    os.environ["SDXL_LORA_HOME"] = str(home)
    pack = load_pack()
    node_classes = {**CORE_NODES, **pack.NODE_CLASS_MAPPINGS}
    outputs: Outputs = {}
    for node_id in _in_order(workflow):
        node = workflow[node_id]
        node_class = node_classes.get(node["class_type"])
        if node_class is None:
            raise ValueError(f"node {node_id}: {node['class_type']} is unknown; known are {', '.join(node_classes)}")
        on_node(node_id, node.get("_meta", {}).get("title", node["class_type"]))
        outputs[node_id] = _run_node(node_id, node_class, _inputs(node_id, node, node_class, outputs), pack)
    return outputs


def _in_order(workflow: Workflow) -> list[str]:
    order: list[str] = []

    def visit(node_id: str, path: tuple[str, ...]) -> None:
        if node_id in path:
            raise ValueError(f"the workflow has a loop through node {node_id}")
        if node_id not in workflow:
            raise ValueError(f"node {path[-1]} is linked to node {node_id}, which is not in the workflow")
        for value in workflow[node_id]["inputs"].values():
            if _is_link(value):
                visit(value[0], (*path, node_id))
        if node_id not in order:
            order.append(node_id)

    for node_id in workflow:
        visit(node_id, ())
    return order


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def _inputs(node_id: str, node: dict[str, Any], node_class: Any, outputs: Outputs) -> dict[str, list[Any]]:
    declared = node_class.INPUT_TYPES()
    missing = set(declared["required"]) - set(node["inputs"])
    if missing:
        raise ValueError(f"node {node_id} ({node['class_type']}) lacks the input {', '.join(sorted(missing))}")
    known = {**declared["required"], **declared.get("optional", {})}
    return {
        name: outputs[value[0]][value[1]] if _is_link(value) else [value]
        for name, value in node["inputs"].items()
        if name in known
    }


def _run_node(node_id: str, node_class: Any, inputs: dict[str, list[Any]], pack: Any) -> tuple[list[Any], ...]:
    count = len(node_class.RETURN_TYPES)
    merged: tuple[list[Any], ...] = tuple([] for _ in range(count))
    if any(isinstance(value, pack.nodes.host.comfy.Nothing) for values in inputs.values() for value in values):
        return tuple([pack.nodes.host.comfy.Nothing()] for _ in range(count))
    is_list = getattr(node_class, "OUTPUT_IS_LIST", (False,) * count)
    node = node_class()
    for arguments in [inputs] if getattr(node_class, "INPUT_IS_LIST", False) else _calls(inputs):
        _validate(node_id, node_class, arguments)
        returned = getattr(node, node_class.FUNCTION)(**arguments)
        result = returned["result"] if isinstance(returned, dict) else returned
        for output, value, several in zip(merged, result, is_list, strict=True):
            blocked = isinstance(value, pack.nodes.host.comfy.Nothing)
            output.extend(value if several and not blocked else [value])
    return merged


def _calls(inputs: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for index in range(max(map(len, inputs.values()), default=1)):
        yield {name: values[min(index, len(values) - 1)] for name, values in inputs.items()}


def _validate(node_id: str, node_class: Any, arguments: dict[str, Any]) -> None:
    if not hasattr(node_class, "VALIDATE_INPUTS"):
        return
    wanted = node_class.VALIDATE_INPUTS.__code__.co_varnames
    verdict = node_class.VALIDATE_INPUTS(**{name: value for name, value in arguments.items() if name in wanted})
    if verdict is not True:
        raise ValueError(f"node {node_id}: {verdict}")


def with_settings(workflow: Workflow, settings: list[str]) -> Workflow:
    """The workflow with inputs replaced as `node.input=value` says; values are JSON, or else plain text."""
    changed = {node_id: {**node, "inputs": dict(node["inputs"])} for node_id, node in workflow.items()}
    for setting in settings:
        target, _, text = setting.partition("=")
        node_id, _, name = target.partition(".")
        if name not in changed.get(node_id, {"inputs": {}})["inputs"]:
            raise ValueError(f"--set {setting}: the workflow has no input {target}")
        try:
            changed[node_id]["inputs"][name] = json.loads(text)
        except json.JSONDecodeError:
            changed[node_id]["inputs"][name] = text
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workflow", type=Path)
    parser.add_argument("--output", type=Path, default=Path("out"), metavar="DIR", help="where results and caches go")
    parser.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="changes one input")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    workflow = with_settings(json.loads(arguments.workflow.read_text(encoding="utf-8")), arguments.set)
    home = arguments.output.absolute()
    run(workflow, home, on_node=lambda node_id, title: log.info("%s %s", node_id, title))
    log.info("results are in %s", home)


if __name__ == "__main__":
    main()
