"""Writes the help pages of the option nodes from the settings themselves: python -m tools.make_docs.

A test compares the pages with the settings.
"""

from __future__ import annotations

from typing import Any

from tools.run_workflow import ROOT, load_pack


def main() -> None:
    for node_id, page in pages().items():
        (ROOT / "web/docs" / f"{node_id}.md").write_text(page, encoding="utf-8", newline="\n")


def pages() -> dict[str, str]:
    pack: Any = load_pack()
    options = pack.nodes.train_options.TrainOptions
    titles = pack.NODE_DISPLAY_NAME_MAPPINGS
    nodes = {node_id: node for node_id, node in pack.NODE_CLASS_MAPPINGS.items() if issubclass(node, options)}
    return {node_id: page(titles[node_id], node) for node_id, node in nodes.items()}


def page(title: str, node: Any) -> str:
    rows = [
        f"| `{name}` | {'a file by its name' if name in node.FILES else _values(kind, shown)} | {shown['tooltip']} |"
        for name, (kind, shown) in node.INPUT_TYPES()["optional"].items()
    ]
    return "\n".join(
        [
            f"# {title}",
            "",
            f"{node.DESCRIPTION}",
            "",
            "Connect `options` to Train SDXL LoRA, or to a further options node. They chain; where two set the same,",
            "the later one wins. Settings at their default change nothing. A setting that contradicts another one,",
            "here or on Train SDXL LoRA, is an error that names both, before any model is loaded.",
            "",
            "| setting | default and range | what it does, and when to touch it |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def _values(kind: Any, shown: dict[str, Any]) -> str:
    if kind == "TRAIN_OPTIONS":
        return "a link"
    if isinstance(kind, list):
        return ", ".join(f"**{choice}**" if choice == shown["default"] else choice for choice in kind)
    if "max" in shown:
        return f"**{shown['default']:g}**, {shown['min']:g} to {shown['max']:g}"
    return {True: "**on**", False: "**off**"}.get(shown["default"], "text") if kind == "BOOLEAN" else "text"


if __name__ == "__main__":
    main()
