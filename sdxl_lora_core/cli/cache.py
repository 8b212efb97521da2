"""The commands of `sdxl-lora cache`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..cache import maintenance
from ..cache.folders import CacheFolders


def add_commands(commands: Any, home: Path) -> None:
    """`home` is where the caches lie unless --home says otherwise."""
    parser = commands.add_parser("cache", help="look at the cache of generated images, and make it smaller")
    under = parser.add_subparsers(required=True)
    for name, help, run in (
        ("stats", "how many images it holds, and how much of its limit", _stats),
        ("verify", "read every image and name the damaged ones, which would be made anew", _verify),
        ("prune", "remove what was not used for longest until the rest fits the limit", _prune),
        ("clear", "remove all images", _clear),
    ):
        command = under.add_parser(name, help=help, description=help)
        command.add_argument(
            "--home", type=Path, default=home, help="where the caches lie, in ComfyUI user/sdxl_lora (%(default)s)"
        )
        command.set_defaults(run=run)
        if name == "verify":
            command.add_argument("--remove", action="store_true", help="remove the damaged ones")
        if name == "prune":
            command.add_argument("--limit-gb", type=float, help="the limit from now on, for all who use this cache")


def _stats(options: argparse.Namespace) -> None:
    print(maintenance.stats(_images(options)))


def _verify(options: argparse.Namespace) -> None:
    images = _images(options)
    damaged = maintenance.verify(images, options.remove)
    if damaged and not options.remove:
        raise ValueError("\n".join([f"{maintenance.damage(damaged)}; --remove removes them:", *damaged]))
    print(f"{maintenance.damage(damaged)} removed")
    print(maintenance.stats(images))


def _prune(options: argparse.Namespace) -> None:
    images = _images(options)
    if options.limit_gb is not None:
        maintenance.set_limit(images, options.limit_gb)
    print(maintenance.prune(images))
    print(maintenance.stats(images))


def _clear(options: argparse.Namespace) -> None:
    print(maintenance.clear(_images(options)))


def _images(options: argparse.Namespace) -> Path:
    """Raises FileNotFoundError where there is no cache: a mistyped folder is not an empty cache."""
    folder = CacheFolders(options.home).images
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no image cache in {options.home}: name the folder with --home")
    return folder
