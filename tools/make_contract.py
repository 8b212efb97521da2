"""Writes tests/nodes/contract.json: what saved graphs and ComfyUI know of the nodes, tooltips and help aside.

    python -m tools.make_contract

Saved graphs name nodes and inputs and hold widget values by position: a node may grow at the end of its optional
inputs and nowhere else. A test compares the file with the nodes, and graphs in tests/saved with what may grow.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from tools.run_workflow import ROOT, load_pack

PATH = ROOT / "tests/nodes/contract.json"
GROUPS = ("required", "optional", "hidden")
WORDS = {"tooltip"}  # may improve at any time
# A file for each combo that lists files: those choices are not part of the code.
FILES = (
    "input/on_disk/config.json",
    *(f"models/{kind}/on_disk.safetensors" for kind in ("checkpoints", "vae", "loras", "controlnet")),
    "models/clip_score/on_disk/config.json",
    "models/captioners/on_disk/config.json",
)

Contract = dict[str, dict[str, Any]]


def main() -> None:
    found = contract()
    changes = differences(found, frozen()) if PATH.exists() else []
    PATH.write_text(dump(found), encoding="utf-8", newline="\n")
    print("\n".join([*changes, f"{PATH.relative_to(ROOT)}: {len(found)} nodes, {len(changes)} differences"]))


def frozen() -> Contract:
    return json.loads(PATH.read_text(encoding="utf-8"))


def contract() -> Contract:
    """The present nodes, independent of the files on this machine."""
    pack = load_pack()
    bare, filled = _inputs(()), _inputs(FILES)
    return {
        node_id: {
            "display_name": pack.NODE_DISPLAY_NAME_MAPPINGS[node_id],
            "category": node.CATEGORY,
            "function": node.FUNCTION,
            "output_node": getattr(node, "OUTPUT_NODE", False),
            "input_is_list": getattr(node, "INPUT_IS_LIST", False),
            **{
                group: [_input(name, spec, filled[node_id][group][name]) for name, spec in inputs.items()]
                for group, inputs in bare[node_id].items()
            },
            "outputs": _outputs(node),
        }
        for node_id, node in pack.NODE_CLASS_MAPPINGS.items()
    }


def _inputs(files: Iterable[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """By node and group, where ComfyUI's folders hold these files alone."""
    with TemporaryDirectory() as home, patch.dict(os.environ, {"SDXL_LORA_HOME": home}):
        for file in files:
            path = Path(home, file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        declared = {node_id: node.INPUT_TYPES() for node_id, node in load_pack().NODE_CLASS_MAPPINGS.items()}
        return {node_id: {group: inputs.get(group, {}) for group in GROUPS} for node_id, inputs in declared.items()}


def _input(name: str, spec: Any, with_files: Any) -> dict[str, Any]:
    if isinstance(spec, str):  # hidden
        return {"name": name, "type": spec}
    kind, options = spec if len(spec) == 2 else (spec[0], {})
    shown: dict[str, Any] = {"name": name, "type": kind}
    if isinstance(kind, list):
        shown |= {"type": "COMBO" if with_files[0] == kind else "COMBO of files", "choices": kind}
    return shown | {option: value for option, value in options.items() if option not in WORDS}


def _outputs(node: Any) -> list[dict[str, Any]]:
    is_list = getattr(node, "OUTPUT_IS_LIST", (False,) * len(node.RETURN_TYPES))
    return [
        {"name": name, "type": kind, "is_list": several}
        for name, kind, several in zip(node.RETURN_NAMES, node.RETURN_TYPES, is_list, strict=True)
    ]


def differences(found: Contract, expected: Contract) -> list[str]:
    """A line for each, with the node and the input."""
    ours, theirs = _facts(found, expected), _facts(expected, found)
    return [
        f"{place}: {ours.get(place, 'nothing')}, and in the contract {theirs.get(place, 'nothing')}"
        for place in {**theirs, **ours}
        if ours.get(place) != theirs.get(place)
    ]


def _facts(contract: Contract, other: Contract) -> dict[str, str]:
    """The declarations of the nodes that both have, by place, as JSON, which distinguishes 1, 1.0 and true."""
    facts = {"nodes": _order(contract)}
    for node_id in (node_id for node_id in contract if node_id in other):
        for key, value in contract[node_id].items():
            if isinstance(value, list):
                facts[f"{node_id}, order of {key}"] = _order(entry["name"] for entry in value)
                facts |= {f"{node_id}, {key} {entry['name']}": _json(entry) for entry in value}
            else:
                facts[f"{node_id}, {key}"] = _json(value)
    return facts


def _order(names: Iterable[str]) -> str:
    return " ".join(names) or "none"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def dump(contract: Contract) -> str:
    """JSON with a line for each input and output, so that a change is a line in a diff."""
    nodes = [f"  {_json(node_id)}: {_dump_node(node)}" for node_id, node in contract.items()]
    return "{\n" + ",\n".join(nodes) + "\n}\n"


def _dump_node(node: dict[str, Any]) -> str:
    return "{\n" + ",\n".join(f"    {_json(key)}: {_dump_value(value)}" for key, value in node.items()) + "\n  }"


def _dump_value(value: Any) -> str:
    if not value or not isinstance(value, list):
        return _json(value)
    return "[\n" + ",\n".join(f"      {_json(entry)}" for entry in value) + "\n    ]"


if __name__ == "__main__":
    main()
