"""What the training's panel costs the training: the calls in each step, and the server's thread that sends messages.

    python -m benchmarks.panel_cost --comfyui ~/ComfyUI

A ComfyUI with one page connected trains the bundled base. A pack beside ours takes the times.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.comfy.conftest import ROOT, python_of, started

RESULT = "panel_cost.json"
PACK = """
import functools, json, os, sys, threading, time

clock = time.pthread_getcpuclockid(threading.main_thread().ident)  # of the thread that serves pages
spent = {"calls": 0, "steps": 0}

def timed(original):
    @functools.wraps(original)
    def on_step(self, step):
        began = time.perf_counter()
        if step.phase == "training" and "began" not in spent:
            spent.update(began=began, serving=time.clock_gettime(clock))
        original(self, step)
        now = time.perf_counter()
        if step.phase == "training":
            calls = spent["calls"] + now - began
            spent.update(calls=calls, steps=step.done, ended=now, served=time.clock_gettime(clock))
            if step.done == step.total:
                with open(os.path.join(os.path.dirname(__file__), "FILE"), "w") as file:
                    json.dump(spent, file)
    return on_step

def loaded():
    modules = [module for name, module in [*sys.modules.items()] if name.endswith("nodes.host.progress")]
    return next((module.Progress for module in modules if hasattr(module, "Progress")), None)

def patch():
    while (progress := loaded()) is None:
        time.sleep(0.01)
    progress.on_step = timed(progress.on_step)

threading.Thread(target=patch, daemon=True).start()  # our pack may be loaded later than this one
NODE_CLASS_MAPPINGS = {}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    comfyui = args.comfyui.expanduser()
    with tempfile.TemporaryDirectory() as folder:
        measured = train(comfyui, Path(folder), args.steps)
    seconds = measured["ended"] - measured["began"]
    serving = measured["served"] - measured["serving"]
    print(f"{measured['steps']} steps in {seconds:.1f} s")
    print(f"calls in the training's thread: {measured['calls']:.3f} s, {measured['calls'] / seconds:.2%}")
    print(f"the thread that serves pages: {serving:.3f} s of processor time, {serving / seconds:.2%}")


def train(comfyui: Path, base: Path, steps: int) -> dict[str, Any]:
    pack = base / "custom_nodes/zz_times"
    pack.mkdir(parents=True)
    (pack / "__init__.py").write_text(PACK.replace("FILE", RESULT), encoding="utf-8")
    workflow = json.loads((ROOT / "example_workflows/api/train_and_compare.json").read_text(encoding="utf-8"))
    wanted = ("LoadSDXLBase", "LoadCaptionDataset", "WatchOptions", "TrainSDXLLoRA")
    graph = {key: node for key, node in workflow.items() if node["class_type"] in wanted}
    for node in graph.values():
        if node["class_type"] == "TrainSDXLLoRA":
            node["inputs"].update(steps=steps, sample_prompts="")
    (base / "workflow.json").write_text(json.dumps(graph), encoding="utf-8")
    python = python_of(comfyui)
    with started(comfyui, python, base) as server:
        page = [python, str(ROOT / "tests/comfy/watch.py"), server.url, str(base / "workflow.json")]
        subprocess.run(page, check=True, capture_output=True)
    return json.loads((pack / RESULT).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
