"""Writes locales/*/nodeDefs.json and main.json, by which ComfyUI's page shows the pack in another language.

    python -m tools.make_locales

tools/translations/<language>.json has the translation of each English text: titles, tooltips and labels of the nodes,
and what the scripts in web/ say. After a change of a text, translate it there and run this again (a test compares).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tools.run_workflow import ROOT, load_pack

FOLDER, SOURCES = ROOT / "locales", ROOT / "tools/translations"
LANGUAGES = ("zh", "ja", "es")  # as ComfyUI's page names them
VOTING_PAGE = ROOT / "sdxl_lora_core/evaluation/templates/vote.html"
_SAID = re.compile(r'"((?:[^"\\]|\\.)*)"')
_SPECIAL = re.compile(r"[{}@|$]")  # of vue-i18n, by which the page shows names and tooltips


def main() -> None:
    for language in LANGUAGES:
        known = read(SOURCES / f"{language}.json")
        for name, values in translated(known).items():
            write(FOLDER / language / f"{name}.json", values)
        texts = english()
        print(f"{language}: {sorted(texts - set(known))[:5]} missing, {sorted(set(known) - texts)[:5]} not used")


def translated(known: Mapping[str, str]) -> dict[str, Any]:
    """The contents of nodeDefs.json and main.json; a text without a translation stays English."""
    nodes = _mapped(node_definitions(), lambda text: _escaped(known.get(text, text)))
    return {"nodeDefs": nodes, "main": {"sdxlLoRA": {text: known.get(text, text) for text in sorted(said())}}}


def english() -> set[str]:
    """All texts that can be translated."""
    return set(_texts(node_definitions())) | said()


def node_definitions() -> dict[str, Any]:
    """By node, as ComfyUI's page reads it: names and tooltips of the node, its inputs and its outputs."""
    pack = load_pack()
    names = pack.NODE_DISPLAY_NAME_MAPPINGS
    return {key: _definition(node, names[key]) for key, node in sorted(pack.NODE_CLASS_MAPPINGS.items())}


def said() -> set[str]:
    """The texts that the scripts give to `say`."""
    files = [*(ROOT / "web").glob("*.js"), VOTING_PAGE]
    return {text for file in files for text in _said_in(file.read_text(encoding="utf-8"))}


def _said_in(script: str) -> Iterator[str]:
    for begin in re.finditer(r"\bsay\(", script):
        yield from _SAID.findall(script[begin.end() : _end_of_first_argument(script, begin.end())])
    for line in re.findall(r"const one = .*, several = .*;", script):
        yield from _SAID.findall(line)


def _end_of_first_argument(script: str, start: int) -> int:
    """Where the first argument of a call ends: at its comma, or at its bracket."""
    depth, quoted = 0, False
    for place in range(start, len(script)):
        letter = script[place]
        quoted ^= letter == '"'
        if quoted:
            continue
        if letter in ",)" and not depth:
            return place
        depth += (letter in "([{") - (letter in ")]}")
    return len(script)


def _definition(node: Any, name: str) -> dict[str, Any]:
    declared = node.INPUT_TYPES()
    inputs = {**declared["required"], **declared.get("optional", {})}
    outputs = zip(node.RETURN_NAMES, node.OUTPUT_TOOLTIPS, strict=True)
    return {
        "display_name": name,
        "description": node.DESCRIPTION,
        "inputs": {key: {"name": key, "tooltip": options["tooltip"]} for key, (_, options) in inputs.items()},
        "outputs": {str(place): {"name": key, "tooltip": tooltip} for place, (key, tooltip) in enumerate(outputs)},
    }


def _texts(values: Any) -> Iterator[str]:
    if isinstance(values, dict):
        for inner in values.values():
            yield from _texts(inner)
    else:
        yield values


def _mapped(values: Any, change: Any) -> Any:
    return (
        {key: _mapped(inner, change) for key, inner in values.items()} if isinstance(values, dict) else change(values)
    )


def _escaped(text: str) -> str:
    return _SPECIAL.sub(lambda found: f"{{'{found[0]}'}}", text)


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def write(file: Path, values: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
