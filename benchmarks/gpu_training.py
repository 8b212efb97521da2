"""Speed and memory of training on a GPU: full-size SDXL with random weights, bf16, 1024 x 1024.

    python -m benchmarks.gpu_training --work DIR      (writes a base of 7 GB into DIR once)

For each case: seconds an update, images a second, torch's peak of allocated bytes, and what the memory plan expected of
a pass. Then whether two deterministic runs, and one that was cut and resumed, end in equal weights.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from safetensors.torch import load_file

from benchmarks.full_size import write_pictures, write_random_base
from sdxl_lora_core.cache.folders import CacheFolders
from sdxl_lora_core.dataset.caption_dataset import CaptionDataset, load_caption_dataset
from sdxl_lora_core.dataset.config import DatasetConfig
from sdxl_lora_core.runtime.determinism import deterministic_steps
from sdxl_lora_core.runtime.device import default_device
from sdxl_lora_core.sdxl.base import SDXLBase, open_base
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.data.batches import TrainingData
from sdxl_lora_core.training.job import RunContext, TrainingJob
from sdxl_lora_core.training.loop import Loop
from sdxl_lora_core.training.monitor.progress import StepReport
from sdxl_lora_core.training.run.runs import RunFolders
from sdxl_lora_core.training.train import train

DEVICE = default_device()
COMMON: dict[str, Any] = {"rank": 16, "alpha": 16.0, "precision": "bf16"}
CASES: dict[str, dict[str, Any]] = {
    "attention, off": {"gradient_checkpointing": "off"},
    "attention, selective": {"gradient_checkpointing": "selective"},
    "attention, on": {"gradient_checkpointing": "on"},
    "attention, off, batch 4": {"gradient_checkpointing": "off", "batch_size": 4},
    "attention, on, batch 4": {"gradient_checkpointing": "on", "batch_size": 4},
    "attention, off, deterministic": {"gradient_checkpointing": "off", "deterministic": True},
    "all-linear, off": {"gradient_checkpointing": "off", "target_modules": "all-linear"},
    "dora, off": {"gradient_checkpointing": "off", "adapter": "dora"},
    "lokr, off": {"gradient_checkpointing": "off", "adapter": "lokr"},
    "loha, off": {"gradient_checkpointing": "off", "adapter": "loha"},
    "text encoders, off": {"gradient_checkpointing": "off", "text_encoder_learning_rate": 5e-5},
    "adamw_fused, off": {"gradient_checkpointing": "off", "optimizer": "adamw_fused"},
    "fp16, off": {"gradient_checkpointing": "off", "precision": "fp16"},
}


@dataclass(frozen=True)
class Bench:
    base: SDXLBase
    dataset: CaptionDataset
    work: Path
    steps: int

    def folders(self, name: str) -> RunFolders:
        place = self.work / "runs" / name
        return RunFolders(place / "loras", place / "runs", CacheFolders(self.work / "cache"), lambda name: False)

    def case(self, name: str, settings: dict[str, Any]) -> None:
        """Prints a row of the table."""
        config = TrainConfig(**{**COMMON, **settings})
        data = TrainingData(TrainingJob(self.base, self.dataset, config), CacheFolders(self.work / "cache"), DEVICE)
        data.cache(lambda phase, done, total: None)
        unused: Any = None
        context = RunContext(self.folders("unused"), DEVICE)
        with (
            Loop(data, context, MagicMock(**{"run.checkpoints.newest.return_value": None}), unused) as loop,
            deterministic_steps(config.deterministic),
        ):
            resting = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            seconds = statistics.median(self._timed(loop) for _ in range(self.steps))
        peak = torch.cuda.max_memory_allocated()
        needed = loop.state.memory.partition("about ")[2].partition(" GB")[0]
        print(
            f"| {name} | {seconds:.3f} | {config.batch_size / seconds:.2f} | {peak / 1e9:.2f} | "
            f"{(peak - resting) / 1e9:.2f} | {needed} |",
            flush=True,
        )

    def _timed(self, loop: Loop) -> float:
        started = time.perf_counter()
        loop.update()
        torch.cuda.synchronize()
        return time.perf_counter() - started

    def weights(self, name: str, *cuts: int) -> dict[str, torch.Tensor]:
        """The LoRA of a deterministic run of 6 updates that is cancelled at `cuts` and resumed."""
        config = TrainConfig(**{**COMMON, "steps": 6, "deterministic": True, "lora_name": name, "save_dtype": "fp32"})
        for cut in (*cuts, None):

            def on_step(report: StepReport, cut: int | None = cut) -> None:
                if report.phase == "training" and report.done == cut:
                    raise KeyboardInterrupt

            try:
                job = TrainingJob(self.base, self.dataset, config)
                return load_file(train(job, RunContext(self.folders(name), DEVICE, on_step)).lora_path)
            except KeyboardInterrupt:
                gc.collect()
        raise AssertionError("the run did not end")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    args = parser.parse_args(arguments)
    folder = args.work / "random-sdxl"
    if not (folder / "model_index.json").exists():
        write_random_base(folder)
    pictures = write_pictures(args.work / f"pictures-{args.size}", args.size, count=8)
    dataset = load_caption_dataset(pictures, DatasetConfig(resolution=args.size))
    bench = Bench(open_base(folder, "bf16", args.work / "hashes"), dataset, args.work, args.steps)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.size} x {args.size}", flush=True)
    print("| case | seconds an update | images a second | peak GB | of it beside weights | planned |")
    print("|---|---|---|---|---|---|")
    for name in args.cases:
        bench.case(name, CASES[name])
        gc.collect()
        torch.cuda.empty_cache()
    whole = bench.weights("whole")
    print("two deterministic runs are equal:", equal(whole, bench.weights("again")))
    print("a run resumed at updates 2 and 4 is equal:", equal(whole, bench.weights("resumed", 2, 4)))
    print(f"allocated in the end: {torch.cuda.memory_allocated() / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
