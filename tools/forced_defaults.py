"""Does a test notice when a setting does nothing? Forces each field of TrainConfig to its default, one at a time.

    python tools/forced_defaults.py [FIELD ...] [--table FILE]

For each field the test files that name it run with the field forced inside TrainConfig; one of them must fail.
Tests that a value is refused do not count, since a forced one never is, nor does one in a file that does not name the
field. The table says which test failed first. Needs no machine to itself, but about half an hour of two cores.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Without the checks of the settings, which would fail for those that need the forced one.
PLUGIN = """
import dataclasses, os
from sdxl_lora_core.training.config.train_config import TrainConfig
FIELD = os.environ["FORCED_FIELD"]
DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
def forced(self):
    if FIELD:
        object.__setattr__(self, FIELD, DEFAULTS[FIELD])
TrainConfig.__post_init__ = forced
"""


def main() -> int:
    from sdxl_lora_core.settings import fields_of
    from sdxl_lora_core.training.config.train_config import TrainConfig

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fields", nargs="*", default=list(fields_of(TrainConfig)))
    parser.add_argument("--table", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    plugin = ROOT / "out" / "forced_plugin.py"
    plugin.parent.mkdir(exist_ok=True)
    plugin.write_text(PLUGIN, encoding="utf-8")
    rows = []
    with ThreadPoolExecutor(args.workers) as pool:
        for field, test in zip(args.fields, pool.map(first_failure, args.fields), strict=True):
            rows.append(f"| `{field}` | {test or '**no test failed**'} |")
            print(rows[-1], flush=True)
    if args.table:
        title = "# The test that fails first when a setting is forced to its default"
        made = "Made by `python tools/forced_defaults.py --table tests/forced_defaults.md`."
        head = [title, "", made, "", "| setting | test |", "|---|---|"]
        args.table.write_text("\n".join([*head, *rows, ""]), encoding="utf-8")
    return any("no test failed" in row for row in rows)


def first_failure(field: str) -> str | None:
    """The id of the first test that fails with `field` forced, and does not with the checks left out alone."""
    word = re.compile(rf"\b{field}\b")
    texts = {path: path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py")}
    found = {path: len(word.findall(text)) / len(text) for path, text in texts.items() if word.search(text)}
    files = sorted(found, key=lambda path: -found[path])  # those that are most about it first
    passed_over: list[str] = []
    while failed := run(field, map(str, files), passed_over):
        if not run("", [failed], []):
            return failed
        passed_over.append(failed)
    return None


def run(field: str, tests: Iterable[str], passed_over: Iterable[str]) -> str | None:
    """The first test that fails."""
    plugins = ["-p", "forced_plugin", "-p", "no:cacheprovider", *(f"--deselect={test}" for test in passed_over)]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-k", "not refused", *plugins, *tests]
    environment = {
        **os.environ,
        "FORCED_FIELD": field,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "out")]),
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    failed = re.search(r"^FAILED (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return failed[1] if failed else None


if __name__ == "__main__":
    sys.exit(main())
