"""Evaluation on the bundled world: wrong captions, memorised images, the better LoRA."""

from __future__ import annotations

import csv
import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdxl_lora_core.cache.folders import CacheFolders
from sdxl_lora_core.dataset.caption_dataset import CaptionDataset, load_caption_dataset, with_validation
from sdxl_lora_core.dataset.config import DatasetConfig
from sdxl_lora_core.evaluation.choice import find_memorised
from sdxl_lora_core.evaluation.comparison import Comparison, ComparisonJob, compare
from sdxl_lora_core.evaluation.metrics import ClipAdherence
from sdxl_lora_core.evaluation.references import find_references
from sdxl_lora_core.evaluation.variants import Variant
from sdxl_lora_core.generation.config import GenerateConfig
from sdxl_lora_core.generation.job import GenerationContext
from sdxl_lora_core.lora.stack import LoRARef
from sdxl_lora_core.sdxl.base import SDXLBase, open_base
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.run.runs import RunFolders
from sdxl_lora_core.training.train import TrainResult
from tests.micro.images import SHARED
from tests.micro.runs import train_on
from tools.run_workflow import ROOT

pytestmark = pytest.mark.accept
DEMO: dict[str, Any] = json.loads((ROOT / "example_workflows/api/train_and_compare.json").read_text(encoding="utf-8"))
IMAGES, CAPTIONS = (ROOT / "assets/sample-dataset" / kind for kind in ("images", "captions"))
NAMES = sorted(path.stem for path in IMAGES.iterdir())
TRAIN = TrainConfig(
    lora_name="accepted",
    steps=250,
    learning_rate=4e-3,
    rank=16,
    alpha=16.0,
    batch_size=4,
    lr_schedule="cosine",
    target_modules="all-linear+conv",
)
PROMPTS = DEMO["4"]["inputs"]["prompt"]


@pytest.fixture(scope="module")
def base() -> SDXLBase:
    return open_base(ROOT / "assets/tiny-sdxl", precision="fp32")


def dataset(folder: Path, captions: Mapping[str, str], **settings: Any) -> CaptionDataset:
    """The bundled images by name, each with the caption of the image that `captions` names."""
    folder.mkdir(parents=True)
    for name, captioned_as in captions.items():
        shutil.copy(IMAGES / f"{name}.png", folder)
        shutil.copy(CAPTIONS / f"{captioned_as}.txt", folder / f"{name}.txt")
    return load_caption_dataset(folder, DatasetConfig(resolution=128, **settings))


def trained(base: SDXLBase, data: CaptionDataset, home: Path, config: TrainConfig) -> TrainResult:
    folders = RunFolders(
        home / "loras", home / "runs", CacheFolders(home / "cache"), lambda name: (home / "loras" / name).exists()
    )
    return train_on(base, data, config, folders=folders)


def variant(result: TrainResult, name: str) -> Variant:
    return Variant(name, (LoRARef(result.lora_path, result.lora_name, 1.0, 1.0),))


def compared(base: SDXLBase, home: Path, variants: list[Variant], prompts: str = PROMPTS, **changes: Any) -> Comparison:
    config = GenerateConfig(
        **{"prompt": prompts, "seed": 7, "count": 4, "guidance": 4.0, "width": 128, "height": 128, **changes}
    )
    job = ComparisonJob(base, config, (Variant("base"), *variants), (ClipAdherence(ROOT / "assets/tiny-clip"),))
    return compare(job, GenerationContext(SHARED, CacheFolders(home / "cache")))


def swapped(seed: int) -> tuple[str, str]:
    """An image, and another one that shares neither color nor shape, whose caption it gets."""
    chance = random.Random(seed)
    name = chance.choice(NAMES)
    return name, chance.choice([other for other in NAMES if not {*name.split("_")} & {*other.split("_")}])


@pytest.mark.parametrize("seed", range(5))
def test_a_swapped_caption_is_among_the_two_worst(base: SDXLBase, tmp_path: Path, seed: int) -> None:
    wrong, caption = swapped(seed)
    captions = {name: name for name in NAMES} | {wrong: caption}
    config = replace(TRAIN, seed=seed, steps=10, image_losses="on")  # the images are measured before the first step
    result = trained(base, dataset(tmp_path / "images", captions), tmp_path, config)
    assert result.image_chart
    rows = list(csv.DictReader(result.image_chart.with_suffix(".csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 24 and f"{wrong}.png" in [row["image"] for row in rows[:2]]


def test_the_trained_lora_wins_and_a_copy_of_it_does_not(base: SDXLBase, tmp_path: Path) -> None:
    """8 prompts x 4 seeds: 30 steps against 250; then the same LoRA at other seeds."""
    data = dataset(tmp_path / "images", {name: name for name in NAMES}, validation_percent=20)
    full, short = (trained(base, data, tmp_path, replace(TRAIN, steps=steps)) for steps in (250, 30))
    found = compared(base, tmp_path, [variant(short, "short"), variant(full, "full")])
    assert found.winner("clip_score") == 2
    over_short = found.difference("clip_score", 2, 1)
    assert over_short.interval.low > 0 and (over_short.prompts, over_short.pairs) == (8, 32)
    other = compared(base, tmp_path, [variant(full, "full")], seed=1007)
    given = [cell.pixels for cell in other.results[1].cells if cell]
    same = compared(base, tmp_path, [variant(full, "full"), Variant("full, other seeds", given=given)])
    assert same.difference("clip_score", 1, 2).verdict == 0 and same.winner("clip_score") is None
    assert not any((find_memorised(found, find_references(None, data)) or pytest.fail("no held-out images")).flagged)


def test_a_lora_trained_on_four_images_memorised_them(base: SDXLBase, tmp_path: Path) -> None:
    few = {name: name for name in NAMES[::6]}
    others = dataset(tmp_path / "others", {name: name for name in NAMES if name not in few})
    data = with_validation(dataset(tmp_path / "four", few), others)
    result = trained(base, data, tmp_path, replace(TRAIN, steps=600))
    prompts = "\n".join(entry.caption for entry in data.entries)
    found = compared(base, tmp_path, [variant(result, "overtrained")], prompts)
    memorised = find_memorised(found, find_references(None, data))
    assert memorised and memorised.flagged == (False, True) and memorised.counts[1] > 12
    with pytest.raises(ValueError, match=f"trained on: {data.entries[0].image.name}"):
        find_references(None, replace(data, validation=data.entries))
