"""Stores what a running ComfyUI says of the nodes in our templates, for linters that work without a server.

    python -m tools.object_info http://127.0.0.1:8188

Writes tests/comfy/object_info/<ComfyUI's version>.json. The lists of files get the names that the templates use.
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from typing import Any

from tools.make_workflows import FILES, OWN
from tools.run_workflow import ROOT

FOLDER = ROOT / "tests/comfy/object_info"
WORKFLOWS = ROOT / "example_workflows/api"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    url = parser.parse_args().url
    version = fetch(f"{url}/system_stats")["system"]["comfyui_version"]
    everything = fetch(f"{url}/object_info")
    used = {node["class_type"] for graph in graphs() for node in graph.values()}
    known = {name: with_files(everything[name]) for name in sorted(used)}
    FOLDER.mkdir(exist_ok=True)
    text = json.dumps(known, ensure_ascii=False, indent=1)
    (FOLDER / f"{version}.json").write_text(text + "\n", encoding="utf-8", newline="\n")


def graphs() -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(WORKFLOWS.glob("*.json"))]


def fetch(url: str) -> Any:
    with urllib.request.urlopen(url) as answer:
        return json.load(answer)


def with_files(node: dict[str, Any]) -> dict[str, Any]:
    """The node, with the names of the templates' files in its lists of files."""
    names = {
        value for graph in graphs() for one in graph.values() for value in one["inputs"].values() if is_file(value)
    }
    for inputs in node["input"].values():
        for name, spec in inputs.items():
            if isinstance(spec, list) and spec and isinstance(spec[0], list) and is_list_of_files(node, name):
                spec[0] = sorted({*spec[0], *names})
    return node


def is_file(value: Any) -> bool:
    return isinstance(value, str) and (value in FILES or value in OWN)


def is_list_of_files(node: dict[str, Any], option: str) -> bool:
    """Whether one of our templates, or ComfyUI's own loader, has a file there."""
    used = [
        one["inputs"].get(option) for graph in graphs() for one in graph.values() if one["class_type"] == node["name"]
    ]
    return any(is_file(value) for value in used)


if __name__ == "__main__":
    main()
