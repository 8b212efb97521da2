"""Prints the measures of the code's structure: python tools/measure.py [ROOT]

Lines of a function are those from its `def` to its end. A room is a package or a module of `sdxl_lora_core/`, or
`nodes/` as a whole; a storey is a level of the longest chain of imports between rooms. Only the product is measured,
except for `# fmt: skip`, which is counted everywhere.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

CORE, NODES = "sdxl_lora_core", "nodes"
MAX_PARAMETERS = 6
MAX_LINES = 60
SKIP_MARK = "# fmt:" + " skip"


@dataclass(frozen=True)
class Function:
    """A function or method of `file`; `owner` is the class around it, empty for none."""

    file: Path
    owner: str
    node: ast.FunctionDef | ast.AsyncFunctionDef

    @property
    def lines(self) -> int:
        return (self.node.end_lineno or self.node.lineno) - self.node.lineno + 1

    @property
    def parameters(self) -> int:
        """Without the first one of methods and of autograd functions."""
        arguments = self.node.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        return sum(argument.arg not in ("self", "cls", "ctx") for argument in named)

    @property
    def name(self) -> str:
        path = f"{self.owner}.{self.node.name}" if self.owner else self.node.name
        return f"{self.file.as_posix()}:{self.node.lineno} {path}"


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    trees = {path.relative_to(root): ast.parse(path.read_text(encoding="utf-8")) for path in product_files(root)}
    print_rooms(imports_between_rooms(trees))
    functions = [function for file, tree in trees.items() for function in functions_of(file, tree)]
    core = [function for function in functions if function.file.parts[0] == CORE]
    print_list(
        f"functions with more than {MAX_PARAMETERS} parameters",
        [f"{function.parameters} {function.name}" for function in functions if function.parameters > MAX_PARAMETERS],
    )
    print_median("execute methods", node_functions(trees, functions, execute_names(trees)))
    print_median("INPUT_TYPES methods", [function for function in functions if function.node.name == "INPUT_TYPES"])
    print_list(
        f"functions over {MAX_LINES} lines",
        [f"{function.lines} {function.name}" for function in functions if function.lines > MAX_LINES],
    )
    lengths = sorted(function.lines for function in core)
    p90 = lengths[int(0.9 * len(lengths))]
    print(f"{CORE}: {len(core)} functions, lines median {statistics.median(lengths):g}, p90 {p90}")
    print_biggest(root)
    print(f"{SKIP_MARK}: {count_skips(root)}")


def product_files(root: Path) -> list[Path]:
    return sorted(path for folder in (CORE, NODES) for path in (root / folder).rglob("*.py"))


def functions_of(file: Path, tree: ast.Module) -> Iterator[Function]:
    """Every function of a file, nested ones included."""
    owners = {
        id(child): parent.name for parent in ast.walk(tree) if isinstance(parent, ast.ClassDef) for child in parent.body
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield Function(file, owners.get(id(node), ""), node)


def execute_names(trees: Mapping[Path, ast.Module]) -> dict[str, str]:
    """For each node class the name of the method that ComfyUI calls, its FUNCTION."""
    names = {}
    for tree in trees.values():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef):
                continue
            for statement in node.body:
                if isinstance(statement, ast.Assign) and [ast.unparse(t) for t in statement.targets] == ["FUNCTION"]:
                    names[node.name] = ast.literal_eval(statement.value)
    return names


def node_functions(
    trees: Mapping[Path, ast.Module], functions: list[Function], names: Mapping[str, str]
) -> list[Function]:
    return [function for function in functions if names.get(function.owner) == function.node.name]


def imports_between_rooms(trees: Mapping[Path, ast.Module]) -> dict[str, set[str]]:
    """For each room those it imports from. Imports inside functions count."""
    rooms: dict[str, set[str]] = {}
    for file, tree in trees.items():
        own = rooms.setdefault(room_of(file.with_suffix("").parts), set())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                package = file.parts[: len(file.parts) - node.level]
                target = (*package, *(node.module.split(".") if node.module else ()))
                targets = [(*target, alias.name) for alias in node.names] if len(target) < 2 else [target]
                own |= {room_of(path) for path in targets}
    return {room: targets - {room, ""} for room, targets in rooms.items() if room}


def room_of(path: tuple[str, ...]) -> str:
    if not path or path[0] not in (CORE, NODES):
        return ""
    if path[0] == NODES:
        return NODES
    return path[1] if len(path) > 1 and path[1] != "__init__" else ""


def print_rooms(imports: Mapping[str, set[str]]) -> None:
    try:
        order = list(TopologicalSorter(imports).static_order())
    except CycleError as error:
        print(f"rooms: {len(imports)}, with a circle: {' -> '.join(error.args[1])}")
        return
    storeys: dict[str, int] = {}
    for room in order:
        storeys[room] = 1 + max((storeys[below] for below in imports.get(room, ())), default=0)
    print(f"rooms: {len(imports)}, storeys: {max(storeys.values())}, circles: 0 (so no arrow upwards)")


def print_list(title: str, entries: list[str]) -> None:
    print(f"{title}: {len(entries)}")
    for entry in sorted(entries, key=lambda entry: -int(entry.partition(" ")[0])):
        print(f"  {entry}")


def print_median(title: str, functions: list[Function]) -> None:
    longest = max(functions, key=lambda function: function.lines)
    median = statistics.median(function.lines for function in functions)
    print(f"{title}: {len(functions)}, lines median {median:g}, max {longest.lines} ({longest.name})")


def print_biggest(root: Path) -> None:
    counts = {
        path.relative_to(root): len(path.read_text(encoding="utf-8").splitlines()) for path in product_files(root)
    }
    for file in sorted(counts, key=lambda file: counts[file], reverse=True)[:3]:
        print(f"biggest file: {counts[file]} lines, {file.as_posix()}")


def count_skips(root: Path) -> int:
    folders = (CORE, NODES, "tests", "tools", "benchmarks")
    files = [path for folder in folders for path in (root / folder).rglob("*.py")]
    return sum(path.read_text(encoding="utf-8").count(SKIP_MARK) for path in files)


if __name__ == "__main__":
    main()
