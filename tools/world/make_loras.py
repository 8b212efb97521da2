"""Trains the two bundled LoRAs with the pack's own trainer, from assets: python tools/world/make_loras.py --work DIR"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch
from make_assets import write_samples

ROOT = Path(__file__).resolve().parents[2]
NAMES = {"8-bit": "8bit_style", "line": "line_style"}


def train_style(style: str, assets: Path, work: Path, settings: dict) -> None:
    from sdxl_lora_core.cache.folders import CacheFolders
    from sdxl_lora_core.dataset.caption_dataset import load_caption_dataset
    from sdxl_lora_core.dataset.config import DatasetConfig
    from sdxl_lora_core.sdxl.base import open_base
    from sdxl_lora_core.training.config.train_config import TrainConfig
    from sdxl_lora_core.training.job import RunContext, TrainingJob
    from sdxl_lora_core.training.run.runs import RunFolders
    from sdxl_lora_core.training.train import train

    images = work / "samples" / NAMES[style]
    write_samples(images, style)
    dataset = load_caption_dataset(images, DatasetConfig(resolution=128))
    config = TrainConfig(lora_name=NAMES[style], seed=0, **settings)
    folders = RunFolders(work / "loras", work / "lora_runs", CacheFolders(work / "cache"), taken=lambda name: False)
    base = open_base(assets / "tiny-sdxl", precision="fp32")
    result = train(TrainingJob(base, dataset, config), RunContext(folders, torch.device("cpu"), _show))
    (assets / "loras").mkdir(exist_ok=True)
    shutil.copyfile(result.lora_path, assets / "loras" / f"{NAMES[style]}.safetensors")


def _show(report: object) -> None:
    if report.done % 50 == 0:
        print(report, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--assets", type=Path, default=ROOT / "assets")
    parser.add_argument("--styles", nargs="+", default=list(NAMES))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=16.0)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr-schedule", default="cosine")
    parser.add_argument("--target-modules", default="all-linear+conv")
    settings = vars(parser.parse_args())
    work, assets, styles = (settings.pop(name) for name in ("work", "assets", "styles"))
    sys.path.insert(0, str(ROOT))
    for style in styles:
        train_style(style, assets, work, settings)


if __name__ == "__main__":
    main()
