"""python tools/dev.py TASK: the project's commands, the same on every system.

demo: trains and generates with the bundled model. test-quick: tests to run while working, about a minute.
test: all that must always hold. accept: sweeps and long runs besides. test-comfy: the tests that need ComfyUI.
wheel: the command line from a built wheel. lint: style, types, spelling and layers.

The first call makes `.venv` and installs requirements-dev.txt into it; later calls need no network.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
REQUIREMENTS = ROOT / "requirements-dev.txt"


def main() -> int:
    tasks = {
        "demo": demo,
        "test-quick": test_quick,
        "test": test,
        "accept": accept,
        "test-comfy": test_comfy,
        "wheel": wheel,
        "lint": lint,
    }
    if len(sys.argv) != 2 or sys.argv[1] not in tasks:
        print(__doc__)
        return 2
    if sys.version_info < (3, 11):  # noqa: UP036 - this is the one file an older Python gets to run
        print(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: {sys.executable}")
        return 2
    install()
    return tasks[sys.argv[1]]()


def install() -> None:
    """Makes .venv once, and again after requirements-dev.txt has changed."""
    mark = VENV / "installed"
    digest = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if mark.exists() and mark.read_text() == digest:
        return
    print("Installing into .venv (once; a few minutes) ...", flush=True)
    venv.create(VENV, with_pip=True)
    pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(REQUIREMENTS)]
    subprocess.run(pip, check=True)
    mark.write_text(digest)


def run(*arguments: str, **environment: str) -> int:
    return subprocess.run(
        [str(PYTHON), *arguments], cwd=ROOT, env={**os.environ, **environment}, check=False
    ).returncode


def demo() -> int:
    started = time.monotonic()
    code = run("tools/demo.py")
    if code == 0:
        print(f"The demo took {time.monotonic() - started:.0f} s.")
    return code


def pytest(selection: str) -> int:
    """In a process for each core, each with one thread: the models are too small for more.

    A process that dies is not replaced: its file would start again, and the run might never end. Files keep their
    order: xdist would sort them by the number of their tests, which says little about their time.
    """
    several = ("-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder", "--max-worker-restart", "0")
    return run("-m", "pytest", "-q", "--ignore=tests/comfy", *several, "-m", selection, OMP_NUM_THREADS="1")


def test_quick() -> int:
    return pytest("not slow and not accept")


def test() -> int:
    return pytest("not accept")


def accept() -> int:
    return pytest("accept")


def wheel() -> int:
    """Builds the engine's wheel, installs it into an environment of its own and runs the command line from there."""
    with tempfile.TemporaryDirectory() as folder:
        clean = Path(folder) / "clean"
        python = clean / PYTHON.relative_to(VENV)
        torch = next(line for line in REQUIREMENTS.read_text().splitlines() if line.startswith("torch=="))
        code = run("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ".")
        if code:
            return code
        venv.create(clean, with_pip=True)
        (built,) = Path(folder).glob("*.whl")
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", torch, str(built)], check=True)
        command = [str(python.with_name("sdxl-lora")), "inspect", str(ROOT / "assets/tiny-sdxl")]
        return subprocess.run(command, cwd=folder, check=False).returncode


def test_comfy() -> int:
    return run("-m", "pytest", "-q", "tests/comfy", REQUIRE_COMFYUI="1")


def lint() -> int:
    return (
        run("-m", "ruff", "check", ".")
        or run("-m", "ruff", "format", "--check", ".")
        or run("-m", "basedpyright", "--level", "error", "--pythonpath", str(PYTHON))
        or run("-m", "codespell_lib")
        or run("-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-logo")
    )


if __name__ == "__main__":
    sys.exit(main())
