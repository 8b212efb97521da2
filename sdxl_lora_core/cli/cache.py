"""The commands of `sdxl-lora cache`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..cache import maintenance
from ..cache.folders import CacheFolders


def add_commands(commands: Any, home: Path) -> None:
    """`home` is the default of --home, the folder of the caches."""
    parser = commands.add_parser("cache", help="show the cache of generated images, and reduce its size")
    under = parser.add_subparsers(required=True)
    for name, help, run in (
        ("stats", "show the number of images, their size and the limit", _stats),
        ("verify", "read every image and list the damaged ones, which would be generated again", _verify),
        ("prune", "delete the least recently used images until the rest fits the limit", _prune),
        ("clear", "delete all images", _clear),
    ):
        command = under.add_parser(name, help=help, description=help)
        command.add_argument(
            "--home", type=Path, default=home, help="the folder of the caches, in ComfyUI user/sdxl_lora (%(default)s)"
        )
        command.set_defaults(run=run)
        if name == "verify":
            command.add_argument("--remove", action="store_true", help="delete the damaged ones")
        if name == "prune":
            command.add_argument(
                "--limit-gb", type=float, help="the new size limit, for every process that uses this cache"
            )


def _stats(options: argparse.Namespace) -> None:
    print(maintenance.stats(_images(options)))


def _verify(options: argparse.Namespace) -> None:
    images = _images(options)
    damaged = maintenance.verify(images, options.remove)
    if damaged and not options.remove:
        raise ValueError("\n".join([f"{maintenance.damage(damaged)}; --remove deletes them:", *damaged]))
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
    """The folder of images. Raises FileNotFoundError if there is none, as for a mistyped --home."""
    folder = CacheFolders(options.home).images
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no image cache in {options.home}: set --home to its folder")
    return folder
