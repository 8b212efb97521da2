"""A training run that version 0.3.0 has finished, the same one half-way, and an image with its LoRA: tests/guards/home.

That folder has the layout of SDXL_LORA_HOME. The files were written by the code of 0.3.0, as guard_cases.py says:

    PYTHONPATH=. python /path/to/tests/guards/runs.py /path/to/tests/guards
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sdxl_lora_core.cache.folders import CacheFolders
from sdxl_lora_core.dataset.caption_dataset import CaptionDataset, load_caption_dataset, with_validation
from sdxl_lora_core.dataset.config import DatasetConfig
from sdxl_lora_core.sdxl.base import SDXLBase, open_base
from sdxl_lora_core.sdxl.vae_override import with_vae
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.job import RunContext, TrainingJob
from sdxl_lora_core.training.monitor.progress import StepReport
from sdxl_lora_core.training.report import save_settings
from sdxl_lora_core.training.run.runs import Run, RunFolders
from sdxl_lora_core.training.train import TrainResult, as_trained, train
from tools.run_workflow import run

ROOT = Path(__file__).resolve().parents[2]
GUARDS = ROOT / "tests/guards"
HOME, PICTURES, TINY_SDXL = GUARDS / "home", GUARDS / "pictures", ROOT / "assets/tiny-sdxl"
CPU = torch.device("cpu")
# A run.yaml holds absolute paths. Those in tests/guards have this in place of the repository's folder.
SOMEWHERE = "/somewhere/sdxl-lora-nodes"

FINISHED = TrainConfig(  # with settings that make small files
    lora_name="guard",
    steps=4,
    learning_rate=0.2,
    rank=1,
    alpha=4.0,
    blocks="mid_block",
    lr_schedule="cosine",
    validate_every=2,
    keep_best="validation_loss",
    precision="fp32",
    gradient_checkpointing="off",
    tensorboard="off",
)
HALFWAY = replace(FINISHED, lora_name="halfway")
STEPS_DONE = 2

SETTINGS = TrainConfig(  # of every type: text, lines, numbers, switches and choices
    lora_name="settings",
    steps=77,
    learning_rate=3e-4,
    rank=4,
    alpha=2.0,
    batch_size=2,
    seed=2**63,
    sample_prompts=("a red circle", "a blue, (round) square: äöü"),
    sample_steps=7,
    sample_guidance=4.5,
    gradient_accumulation=3,
    lr_schedule="polynomial",
    lr_power=1.5,
    lr_warmup_steps=5,
    caption_dropout=0.05,
    adapter="dora",
    use_rslora=True,
    block_ranks="up_blocks.0=2",
    loss="smooth_l1",
    snr_gamma=5.0,
    timestep_max=900,
    optimizer="came",
    shuffle_tags=True,
    keep_tags=1,
    validate_every=11,
    early_stopping=3,
    memory_limit_gb=6.5,
    deterministic=True,
    save_format="peft",
    save_dtype="bf16",
    text_encoder_learning_rate=5e-5,
    new_tokens="ohwx=cat",
    vectors_per_token=2,
)

IMAGE: dict[str, dict[str, Any]] = {
    "1": {"class_type": "LoadSDXLBase", "inputs": {"base": "tiny-sdxl (bundled)", "precision": "fp32"}},
    "2": {
        "class_type": "LoadLoRA",
        "inputs": {"lora_name": "guard.safetensors", "strength_model": 0.8, "strength_clip": 0.8, "enabled": True},
    },
    "3": {
        "class_type": "SDXLGenerateCached",
        "inputs": {
            "base": ["1", 0],
            "lora_stack": ["2", 0],
            "prompt": "a red circle",
            "negative_prompt": "blurry",
            "seed": 3,
            "steps": 4,
            "guidance": 4.0,
            "width": 64,
            "height": 64,
            "count": 1,
            "sampler": "dpmpp_2m",
            "scheduler": "karras",
            "cache": "use",
            "keep_latents": True,
        },
    },
}


def tiny_sdxl() -> SDXLBase:
    return open_base(TINY_SDXL, "fp32")


def pictures() -> CaptionDataset:
    return load_caption_dataset(PICTURES, DatasetConfig(resolution=64, validation_percent=25))


def trained(home: Path, config: TrainConfig, on_step: Callable[[StepReport], None]) -> TrainResult:
    loras = home / "loras"
    cache = CacheFolders(home / "user/sdxl_lora")
    folders = RunFolders(loras, home / "lora_runs", cache, lambda name: (loras / name).exists())
    return train(TrainingJob(tiny_sdxl(), pictures(), config), RunContext(folders, CPU, on_step))


class Cancelled(Exception):
    pass


def _cancel_halfway(report: StepReport) -> None:
    if report.phase == "training" and report.done == STEPS_DONE:
        raise Cancelled


def write_runs(home: Path) -> None:
    trained(home, FINISHED, lambda report: None)
    try:
        trained(home, HALFWAY, _cancel_halfway)
    except Cancelled:
        return
    raise AssertionError("the run was not cancelled half-way")


def write_every_setting(folder: Path) -> None:
    """A run.yaml alone: with several data sets, pictures to validate with, and a base of which all is said."""
    said = open_base(TINY_SDXL, "fp32", prediction="v_prediction", zero_terminal_snr="on")
    base = as_trained(with_vae(said, TINY_SDXL / "vae"), SETTINGS)
    chained = load_caption_dataset(ROOT / "assets/sample-dataset", DatasetConfig(trigger_word="ohwx", flip=True))
    regular = load_caption_dataset(PICTURES, DatasetConfig(resolution=64, is_regularisation=True), chained)
    dataset = with_validation(regular, load_caption_dataset(PICTURES, DatasetConfig(resolution=64)))
    job = TrainingJob(base, dataset, SETTINGS)
    save_settings(Run("settings", folder, folder / "unused", {}), job, {"fingerprint": job.fingerprint})


def without_traces(home: Path) -> None:
    """Removes what says something of this machine, or is not needed."""
    for folder in (home / "user/sdxl_lora/hashes", home / "temp"):
        shutil.rmtree(folder)
    for lock in home.rglob("*.lock"):
        lock.unlink()
    for file in home.rglob("run.yaml"):
        file.write_text(file.read_text(encoding="utf-8").replace(str(ROOT), SOMEWHERE), encoding="utf-8")


def main(folder: Path) -> None:
    home = folder / "home"
    write_runs(home)
    run(IMAGE, home)
    write_every_setting(home / "lora_runs/settings")
    without_traces(home)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
