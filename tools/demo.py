"""Runs example_workflows/api/train_and_compare.json with the pack's own nodes and shows what came out in out/demo/."""

from __future__ import annotations

import json
import logging
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from run_workflow import ROOT, Outputs, Workflow, load_pack, run

HOME = ROOT / "out" / "demo"
STYLE_WORDS = "8-bit illustration of "
LABEL_HEIGHT, PICTURE = 34, 128


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    workflow = json.loads((ROOT / "example_workflows/api/train_and_compare.json").read_text(encoding="utf-8"))
    print("Training a LoRA on the bundled images, then generating the same prompts without and with it.")
    outputs = run(workflow, HOME, on_node=lambda node_id, title: print(f"  {title}", flush=True))
    before, after, prompts = images_of(workflow, outputs)
    before_after_grid(before, after, prompts).save(HOME / "before_after.png")
    lora = copy_results(workflow, outputs)
    table = score_table(before, after, prompts)
    (HOME / "scores.md").write_text(table, encoding="utf-8")
    print(f"\n{table}\nIn {HOME.relative_to(ROOT)}:")
    print("  before_after.png  the same prompts and seeds, without and with the LoRA")
    print("  loss.png          the loss of the training")
    print(f"  loras/{lora}  the LoRA, for ComfyUI, diffusers and others")
    print("  scores.md         the table above; cache, checkpoints and run.yaml are beside it")


def images_of(workflow: Workflow, outputs: Outputs) -> tuple[list[np.ndarray], list[np.ndarray], list[str]]:
    """uint8 images without and with the LoRA, and the prompt of each."""
    nodes = {
        "lora_stack" in node["inputs"]: outputs[node_id]
        for node_id, node in workflow.items()
        if node["class_type"] == "SDXLGenerateCached"
    }
    from_image = load_pack().nodes.wires.from_image
    return from_image(nodes[False][0][0]), from_image(nodes[True][0][0]), nodes[True][2][0].splitlines()


def copy_results(workflow: Workflow, outputs: Outputs) -> str:
    """The newest run's loss chart to where it is looked for; returns the LoRA's file name."""
    (node_id,) = (key for key, node in workflow.items() if node["class_type"] == "TrainSDXLLoRA")
    lora = outputs[node_id][1][0]
    shutil.copy(HOME / "lora_runs" / Path(lora).stem / "loss.png", HOME / "loss.png")
    return lora


def before_after_grid(before: list[np.ndarray], after: list[np.ndarray], prompts: list[str]) -> Image.Image:
    """A column for each prompt with its first seed: without above, with below."""
    firsts = [number for number, prompt in enumerate(prompts) if prompt not in prompts[:number]]
    grid = Image.new("RGB", (PICTURE * len(firsts), 2 * (PICTURE + 4) + LABEL_HEIGHT), "white")
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default(10)
    for column, number in enumerate(firsts):
        left = column * PICTURE
        grid.paste(Image.fromarray(before[number]), (left, LABEL_HEIGHT))
        grid.paste(Image.fromarray(after[number]), (left, LABEL_HEIGHT + PICTURE + 4))
        content = prompts[number].removeprefix(STYLE_WORDS).replace(" on a ", "\non a ")
        pen.multiline_text((left + 4, 4), content, fill="black", font=font, spacing=2)
    return grid


def score_table(before: list[np.ndarray], after: list[np.ndarray], prompts: list[str]) -> str:
    """CLIP scores of all pairs (same prompt, same seed), with the style words in the text and without them."""
    rows = [("with the style words", prompts), ("without them", [p.removeprefix(STYLE_WORDS) for p in prompts])]
    lines = [
        f"CLIP score (tiny-clip), {len(prompts)} pairs of the same prompt and seed",
        "",
        "| text scored | without LoRA | with LoRA | difference | sd of the pairs' difference | pairs won |",
        "|---|---|---|---|---|---|",
    ]
    for name, texts in rows:
        plain, styled = scores(before, texts), scores(after, texts)
        gains = [b - a for a, b in zip(plain, styled, strict=True)]
        lines.append(
            f"| {name} | {summary(plain)} | {summary(styled)} | {statistics.mean(gains):+.2f} "
            f"| {statistics.stdev(gains):.2f} | {sum(gain > 0 for gain in gains)} of {len(gains)} |"
        )
    return "\n".join(lines) + "\n"


def scores(images: list[np.ndarray], texts: list[str]) -> list[float]:
    scoring: Any = load_pack().nodes.scoring
    report = scoring.score_images(images, texts, ROOT / "assets" / "tiny-clip", torch.device("cpu"))
    return [score.clip_score for score in report.scores]


def summary(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} (sd {statistics.stdev(values):.2f})"


if __name__ == "__main__":
    main()
