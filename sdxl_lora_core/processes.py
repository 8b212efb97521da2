"""The processes of one run: each holds the whole model and takes its share of every batch (data parallel).

`accelerate launch` starts them; without it there is one, and nothing here does anything.
"""

from __future__ import annotations

from .runtime.distributed import Processes
from .train_config import TrainConfig


def require_work_for_all(config: TrainConfig, processes: Processes) -> None:
    """Raises ValueError if an update has fewer images than there are processes."""
    images = config.batch_size * config.gradient_accumulation
    if images < processes.count:
        raise ValueError(
            f"an update has {images} images (batch_size {config.batch_size}, gradient_accumulation "
            f"{config.gradient_accumulation}) and there are {processes.count} processes: raise one of the two"
        )
