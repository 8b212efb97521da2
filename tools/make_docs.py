"""Updates the help pages of all nodes: python -m tools.make_docs

The title with its picture and the lists of inputs and outputs are made from the node and its settings; everything
else on a page is written by hand and kept. On the pages of the option nodes that is what follows the list. A test
compares the pages with the nodes.
"""

from __future__ import annotations

import re
from typing import Any

from tools.run_workflow import ROOT, load_pack

PAGES = ROOT / "web/docs"
OPTIONS_TEXT = """\
Connect `options` to Train SDXL LoRA or to another options node. Of two nodes that change the same setting, the later
one applies. Settings at their default change nothing. A setting that contradicts another one, here or on Train SDXL
LoRA, is an error that names both, before any model is loaded. A setting that has no effect with the others is a note
on the node.
"""


def main() -> None:
    for node_id, page in pages().items():
        (PAGES / f"{node_id}.md").write_text(page, encoding="utf-8", newline="\n")


def pages() -> dict[str, str]:
    """The page of each node, by the node's id."""
    pack: Any = load_pack()
    options, titles = pack.nodes.train_options.TrainOptions, pack.NODE_DISPLAY_NAME_MAPPINGS
    return {
        node_id: options_page(node_id, titles[node_id], node)
        if issubclass(node, options)
        else updated_page(node_id, titles[node_id], node)
        for node_id, node in pack.NODE_CLASS_MAPPINGS.items()
    }


def options_page(node_id: str, title: str, node: Any) -> str:
    _, mistakes, text = (PAGES / f"{node_id}.md").read_text(encoding="utf-8").partition("\n## Common mistakes\n")
    made = f"{heading(node_id, title)}{node.DESCRIPTION}\n\n{OPTIONS_TEXT}\n{inputs_list(node)}"
    return f"{made}{mistakes}{text}"


def heading(node_id: str, title: str) -> str:
    """The title, and the picture by tools.node_pictures."""
    return f"# {title}\n\n![{title}]({node_id}.jpg)\n\n"


def updated_page(node_id: str, title: str, node: Any) -> str:
    """The page with a new title and new lists."""
    page = (PAGES / f"{node_id}.md").read_text(encoding="utf-8")
    page = re.sub(r"\A# .*\n\n(!\[.*\n\n)?", lambda _: heading(node_id, title), page)
    page = with_list(page, "Inputs", inputs_list(node))
    return with_list(page, "Outputs", outputs_list(node))


def with_list(page: str, heading: str, items: str) -> str:
    """Replaces the list below a heading. Raises ValueError for a page without it."""
    replaced, count = re.subn(rf"(^## {heading}\n\n)(?:- .*\n)+", lambda found: found[1] + items, page, flags=re.M)
    if count != 1:
        raise ValueError(f"the page has {count} lists below '## {heading}': give it one")
    return replaced


def inputs_list(node: Any) -> str:
    """A list, since ComfyUI's help panel is too narrow for a table, and for long names in a font of one width."""
    declared = node.INPUT_TYPES()
    inputs = {**declared["required"], **declared.get("optional", {})}
    files = getattr(node, "FILES", {})
    rows = [f"- **{name}**: {_values(name in files, *found)}. {_help(found[1])}\n" for name, found in inputs.items()]
    return "".join(rows)


def outputs_list(node: Any) -> str:
    texts = zip(node.RETURN_NAMES, node.OUTPUT_TOOLTIPS, strict=True)
    return "".join(f"- **{name}**: {text}\n" for name, text in texts)


def _help(shown: dict[str, Any]) -> str:
    return f"{'*Advanced.* ' if shown.get('advanced') else ''}{shown['tooltip']}"


def _values(is_file: bool, kind: Any, shown: dict[str, Any]) -> str:
    if is_file or (isinstance(kind, list) and "default" not in shown):
        return "a file or folder by its name"
    if isinstance(kind, list):
        return ", ".join(f"{choice} (default)" if choice == shown["default"] else choice for choice in kind)
    if kind not in ("INT", "FLOAT", "STRING", "BOOLEAN"):
        return f"a link ({kind})"
    if "max" in shown:
        return f"{_number(shown['default'])} ({_number(shown['min'])} to {_number(shown['max'])})"
    return {True: "on", False: "off"}.get(shown["default"], "text") if kind == "BOOLEAN" else "text"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


if __name__ == "__main__":
    main()
