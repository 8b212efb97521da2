"""How long ComfyUI says that importing this pack takes, in the report that it writes when it starts.

    python -m benchmarks.start_report --comfyui ~/ComfyUI

The first start compiles the pack's files; the others find them compiled, as from a user's second start on.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from pathlib import Path

from tests.comfy.conftest import install_pack, python_of

STARTS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True)
    comfyui = parser.parse_args().comfyui.expanduser()
    with tempfile.TemporaryDirectory() as folder:
        install_pack(Path(folder) / "custom_nodes/sdxl-lora-nodes")
        first, *warm = [reported(comfyui, Path(folder)) for _ in range(STARTS)]
    print(f"seconds at the first start: {first}; at the next {len(warm)}: {', '.join(warm)}")


def reported(comfyui: Path, base: Path) -> str:
    """The seconds in the pack's line of one start."""
    command = [python_of(comfyui), "main.py", "--cpu", "--quick-test-for-ci", "--base-directory", str(base)]
    command += ["--database-url", f"sqlite:///{base}/comfyui.db"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, cwd=comfyui, env=environment, capture_output=True, text=True, check=True)
    [seconds] = re.findall(r"([\d.]+) seconds: .*sdxl-lora-nodes\n", done.stdout + done.stderr)
    return seconds


if __name__ == "__main__":
    main()
