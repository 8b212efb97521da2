"""sdxl-lora: the engine from the command line.

sdxl-lora train run.yaml [--set rank=16]    repeats or resumes a run; Ctrl-C finishes it early and keeps the LoRA
sdxl-lora settings [train|datasets|...]     lists settings with their defaults and ranges
sdxl-lora caption FOLDER --captioner MODEL  writes the captions of a folder of images
sdxl-lora report FOLDER                     checks a dataset before training
sdxl-lora generate BASE --prompt TEXT       generates images with LoRAs, through the image cache
sdxl-lora score FOLDER --clip-model FOLDER  scores captioned images
sdxl-lora compare BASE --prompt TEXT        compares LoRAs, checkpoints, strengths or settings, with intervals
sdxl-lora inspect FILE_OR_FOLDER            describes a base, a LoRA, a ControlNet or a dataset
sdxl-lora cache stats|verify|prune|clear    shows the cache of generated images, and reduces its size
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ..cache.folders import CacheFolders
from ..control.control_net import describe_control_net, open_control_net
from ..dataset.caption_dataset import load_caption_dataset
from ..dataset.config import DatasetConfig
from ..dataset.report import describe
from ..lora.describe import describe_lora
from ..runtime.device import default_device
from ..runtime.distributed import FirstFailed
from ..sdxl.base import describe_base, open_base, open_sd15_base
from ..training.job import RunContext
from ..training.loop import Diverged
from ..training.monitor.progress import StepReport
from ..training.run.runs import RunFolders
from ..training.train import train
from . import cache, caption, evaluate, settings_list
from .bar import Bar
from .run_file import read_run
from .signals import Interruption, Left

HOME = Path("output/sdxl_lora")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="sdxl-lora", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("train", help="train from a run.yaml")
    command.add_argument("settings", type=Path)
    command.add_argument("--output", type=Path, default=Path("output"), help="gets loras/ and lora_runs/")
    command.add_argument("--home", type=Path, default=HOME, help="the folder of the caches")
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="overrides a train setting")
    command.add_argument("--device", type=torch.device, default=default_device())
    command.set_defaults(run=_train)
    command = commands.add_parser("inspect", help="describe a base, a LoRA, a ControlNet or a dataset")
    command.add_argument("path", type=Path)
    command.set_defaults(run=_inspect)
    cache.add_commands(commands, HOME)
    caption.add_command(commands)
    evaluate.add_commands(commands, HOME)
    settings_list.add_command(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, Diverged, FirstFailed, torch.OutOfMemoryError) as error:
        sys.exit(f"sdxl-lora: {error}")
    except Left as error:
        _print_error(f"sdxl-lora: {error}")
        sys.exit(error.exit_status)


def _print_error(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _train(options: argparse.Namespace) -> None:
    cache, loras = CacheFolders(options.home), options.output / "loras"
    job = read_run(options.settings, cache.hashes, settings_list.read_changes(options.set))
    folders = RunFolders(loras, options.output / "lora_runs", cache, lambda name: (loras / name).exists())
    is_first = os.environ.get("RANK", "0") == "0"  # of several processes, only the first one prints
    with Bar() as bar, Interruption(_print_error) as interruption:

        def on_step(report: StepReport) -> None:
            if is_first:
                bar(report.phase, report.done, report.total, report.detail)
            interruption.check()

        result = train(job, RunContext(folders, options.device, on_step, interruption.should_stop))
    if is_first:
        print(result.report.to_json())
        print(result.lora_path)


def _inspect(options: argparse.Namespace) -> None:
    """Describes a base, a LoRA, a ControlNet or a dataset, by the first reader that accepts the path."""
    readers: list[Callable[[Path], str]] = [
        lambda path: describe_base(open_base(path)),
        lambda path: describe_base(open_sd15_base(path)),
        describe_lora,
        lambda path: describe_control_net(open_control_net(path)),
        lambda path: describe(load_caption_dataset(path, DatasetConfig())),
    ]
    refusals = []
    for read in readers:
        try:
            return print(read(options.path))
        except (ValueError, OSError) as error:
            refusals.append(str(error))
    raise ValueError("\n".join(refusals))
