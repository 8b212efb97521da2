"""One of the processes of a run, forked from a server that has everything imported; torchrun starts each anew."""

from __future__ import annotations

import os
import socket
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import diffusers.models.unets.unet_2d_condition  # noqa: F401 - these three are imported once, before the fork
import peft  # noqa: F401
import torch

import sdxl_lora_core.training.train  # noqa: F401
from sdxl_lora_core.cli.main import main

COUNT = 2


def start_ranks(context: Any, arguments: list[str], output: Path) -> list[ForkServerProcess]:
    """`sdxl-lora` with these arguments in COUNT processes that find each other as torchrun's do.

    What rank N says goes to the file `output`.N.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [context.Process(target=_run, args=(rank, port, arguments, output)) for rank in range(COUNT)]
    for rank in ranks:
        rank.start()
    return ranks


def _run(rank: int, port: int, arguments: list[str], output: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(COUNT),
        "LOCAL_WORLD_SIZE": str(COUNT),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with open(f"{output}.{rank}", "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    main(arguments)
