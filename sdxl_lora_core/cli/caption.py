"""`sdxl-lora caption`: writes the captions of a folder of images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ..captioning.caption_folder import caption_folder
from ..captioning.captioner import Captioner, open_captioner
from ..captioning.config import CaptionConfig
from ..captioning.given import given_captions
from ..runtime.device import default_device
from ..settings import from_mapping
from .bar import Bar
from .settings_list import read_changes


def add_command(commands: Any) -> None:
    command = commands.add_parser("caption", help="write the captions of a folder of images")
    command.add_argument("folder", type=Path)
    either = command.add_mutually_exclusive_group(required=True)
    either.add_argument("--captioner", type=Path, help="the folder of BLIP, BLIP-2, Florence-2 or a tagger")
    either.add_argument("--captions", type=Path, help="a text file with a line for each image, in the order of names")
    command.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting, such as detail=short"
    )
    command.add_argument("--device", type=torch.device, default=default_device())
    command.set_defaults(run=_caption)


def _caption(options: argparse.Namespace) -> None:
    config = from_mapping(CaptionConfig, read_changes(options.set))
    with Bar() as bar:
        report = caption_folder(
            options.folder, _captioner(options, config), config, lambda done, total: bar("captioning", done, total)
        )
    print("\n".join(report.sentences()))


def _captioner(options: argparse.Namespace, config: CaptionConfig) -> Captioner:
    if options.captions:
        return given_captions(options.folder, options.captions.read_text(encoding="utf-8").splitlines())
    return open_captioner(options.captioner, config, options.device)
