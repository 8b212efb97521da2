"""The demo's training in full: what README promises of it, and what many trainings in one process leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.micro.runs import parameters_alive
from tools.compare_with import demo_training
from tools.run_workflow import ROOT, Workflow, load_pack, run

pytestmark = pytest.mark.accept
DEMO: Workflow = json.loads((ROOT / "example_workflows/api/train_and_compare.json").read_text(encoding="utf-8"))


def node_of(class_type: str, graph: Workflow, lora: bool = False) -> str:
    """The id of the node of that type, with or without a link `lora_stack`."""
    found = (key for key, node in graph.items() if node["class_type"] == class_type)
    (wanted,) = (key for key in found if ("lora_stack" in graph[key]["inputs"]) == lora)
    return wanted


def test_the_demo_is_drawn_in_the_trained_style(tmp_path: Path) -> None:
    """CLIP scores of the same prompts and seeds without and with the LoRA, 8 prompts x 2 seeds."""
    outputs = run(DEMO, tmp_path)
    pack: Any = load_pack()
    plain, styled = (outputs[node_of("SDXLGenerateCached", DEMO, lora)] for lora in (False, True))
    prompts = styled[2][0].splitlines()

    def scores(images: torch.Tensor) -> list[float]:
        pixels = pack.nodes.wires.from_image(images)
        report = pack.nodes.scoring.score_images(pixels, prompts, ROOT / "assets/tiny-clip", torch.device("cpu"))
        return [score.clip_score for score in report.scores]

    gains = [after - before for before, after in zip(scores(plain[0][0]), scores(styled[0][0]), strict=True)]
    assert len(gains) == 16
    assert sum(gains) / len(gains) > 4, "README says 6.8 with a deviation of 4.3"
    assert sum(gain > 0 for gain in gains) >= 13, "README says 15 of 16"


def test_ten_trainings_in_one_process_leave_no_parameter_behind(tmp_path: Path) -> None:
    alive = []
    for seed in range(10):
        graph = demo_training(steps=2)
        graph[node_of("TrainSDXLLoRA", graph)]["inputs"] |= {"seed": seed, "lora_name": f"run-{seed}"}
        run(graph, tmp_path / str(seed))  # a cache of its own, so that the memory plan counts each time
        alive.append(len(parameters_alive()))
    assert alive[1:] == alive[:-1]
