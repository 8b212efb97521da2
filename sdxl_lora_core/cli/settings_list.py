"""`sdxl-lora settings`: lists settings from their declarations."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

from ..captioning.config import CaptionConfig
from ..dataset.config import DatasetConfig
from ..evaluation.config import ScoreConfig
from ..generation.config import GenerateConfig
from ..messages import shown
from ..settings import choices_of, declared, default, fields_of, types_of
from ..training.config.train_config import TrainConfig

SECTIONS: dict[str, type] = {
    "train": TrainConfig,
    "datasets": DatasetConfig,
    "generate": GenerateConfig,
    "score": ScoreConfig,
    "caption": CaptionConfig,
}
_TYPES = {int: "whole number", float: "number", bool: "true or false", str: "text"}


def add_command(commands: Any) -> None:
    command = commands.add_parser("settings", help="list the settings of a run.yaml, of generate, score and caption")
    command.add_argument("section", nargs="?", choices=SECTIONS, default="train")
    command.add_argument("name", nargs="*", help="list only these settings")
    command.set_defaults(run=_list)


def read_changes(texts: list[str]) -> dict[str, Any]:
    """Parses `rank=16` and so on; a value is YAML, as in run.yaml. Raises ValueError for any other text."""
    import yaml

    changes: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text}: use NAME=VALUE, such as rank=16")
        try:
            changes[name.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, RecursionError, ValueError) as error:  # such as an unclosed bracket
            raise ValueError(f"--set {text}: {shown(value)} is not a YAML value: put the text in quotes") from error
    return changes


def _list(options: argparse.Namespace) -> None:
    config = SECTIONS[options.section]
    known = fields_of(config)
    if unknown := [name for name in options.name if name not in known]:
        raise ValueError(f"unknown setting {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    width = min(shutil.get_terminal_size().columns, 120)
    for name in options.name or known:
        print("\n".join(described(config, name, width)))


def described(config: type, name: str, width: int) -> Iterator[str]:
    """The lines of one setting: name, default, values and help."""
    yield f"{name} = {_shown(default(config, name))}  ({_values(config, name)})"
    yield textwrap.fill(declared(config, name).help, width, initial_indent="    ", subsequent_indent="    ")


def _values(config: type, name: str) -> str:
    if choices := choices_of(config, name):
        return ", ".join(choices)
    kind, allowed = types_of(config)[name], declared(config, name).range
    limits = f", {allowed.low:g} to {allowed.high:g}" if allowed else ""
    return f"{_TYPES.get(kind, 'a list of texts')}{limits}"


def _shown(value: Any) -> str:
    """The value as YAML writes it."""
    import yaml

    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True).removesuffix("...\n").strip()
