"""What base weights in int8 and fp8 cost in quality: the demo's training on tiny-sdxl, against bf16.

    python -m benchmarks.base_weights --work DIR      (some minutes; finished trainings are found again)

For each format: the validation loss of held-out images after training, and the CLIP score of images of 8 prompts and 4
seeds with the LoRA, generated on the base in full. The difference from bf16 is with a 95 % interval over prompts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, cast

import numpy as np

from sdxl_lora_core.cache.folders import CacheFolders
from sdxl_lora_core.dataset.caption_dataset import load_caption_dataset
from sdxl_lora_core.dataset.config import DatasetConfig
from sdxl_lora_core.evaluation.clip_score import score_images
from sdxl_lora_core.evaluation.statistics import paired_difference
from sdxl_lora_core.generation.config import GenerateConfig
from sdxl_lora_core.generation.generate import generate
from sdxl_lora_core.generation.job import GenerationContext, GenerationJob
from sdxl_lora_core.lora.stack import LoRARef
from sdxl_lora_core.runtime.device import default_device
from sdxl_lora_core.runtime.loaded_parts import LoadedParts
from sdxl_lora_core.sdxl.base import open_base
from sdxl_lora_core.training.config.memory import WeightFormat
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.job import RunContext, TrainingJob
from sdxl_lora_core.training.run.runs import RunFolders
from sdxl_lora_core.training.train import TrainResult, train

ROOT = Path(__file__).resolve().parents[1]
GRAPH = json.loads((ROOT / "example_workflows/api/train_and_compare.json").read_text(encoding="utf-8"))
SETTINGS = ("steps", "learning_rate", "rank", "alpha", "batch_size", "seed", "lr_schedule", "target_modules")
FORMATS = cast("tuple[WeightFormat, ...]", ("full", "int8", "fp8"))
SEEDS = 4
DEVICE = default_device()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=GRAPH["3"]["inputs"]["steps"])
    args = parser.parse_args()
    results = {form: trained(args.work, form, args.steps) for form in FORMATS}
    scores = {form: clip_scores(args.work, result) for form, result in results.items()}
    print("| base weights | validation loss | against bf16 | CLIP score | difference from bf16 (95 %) |")
    print("|---|---|---|---|---|")
    for form, result in results.items():
        loss, plain = (one.report.validation_loss or float("nan") for one in (result, results["full"]))
        apart = paired_difference(scores[form], scores["full"])
        low, high = apart.interval.low, apart.interval.high
        shown = "" if form == "full" else f"{apart.mean:+.3f} ({low:+.3f} to {high:+.3f})"
        name = "bf16" if form == "full" else form
        print(f"| {name} | {loss:.5f} | {loss / plain - 1:+.2%} | {scores[form].mean():.2f} | {shown} |")


def trained(work: Path, form: WeightFormat, steps: int) -> TrainResult:
    settings: dict[str, Any] = {name: GRAPH["3"]["inputs"][name] for name in SETTINGS}
    config = TrainConfig(
        **{**settings, "steps": steps},
        lora_name=f"demo_{form}",
        precision="bf16",
        base_weights=form,
    )
    pictures = DatasetConfig(resolution=GRAPH["2"]["inputs"]["resolution"], validation_percent=20)
    dataset = load_caption_dataset(ROOT / "assets/sample-dataset", pictures)
    job = TrainingJob(open_base(ROOT / "assets/tiny-sdxl", "bf16"), dataset, config)
    folders = RunFolders(work / "loras", work / "runs", CacheFolders(work / "cache"), lambda name: False)
    return train(job, RunContext(folders, DEVICE))


def clip_scores(work: Path, result: TrainResult) -> np.ndarray:
    """Scores [prompts, seeds]."""
    inputs: dict[str, Any] = GRAPH["5"]["inputs"]
    same = ("prompt", "seed", "steps", "guidance", "width", "height", "prompt_per_line")
    config = GenerateConfig(**{name: inputs[name] for name in same}, count=SEEDS)
    job = GenerationJob(
        open_base(ROOT / "assets/tiny-sdxl", "fp32"), config, [LoRARef(result.lora_path, result.lora_name, 1.0, 1.0)]
    )
    images = generate(job, GenerationContext(LoadedParts(DEVICE), CacheFolders(work / "cache")))
    prompts = inputs["prompt"].splitlines()
    texts = [prompt for prompt in prompts for _ in range(SEEDS)]
    report = score_images([image.pixels for image in images], texts, ROOT / "assets/tiny-clip", DEVICE)
    return np.array([score.clip_score for score in report.scores]).reshape(len(prompts), SEEDS)


if __name__ == "__main__":
    main()
