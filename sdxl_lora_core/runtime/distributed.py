"""Data-parallel processes: each has the whole model and computes its share of every batch.

`accelerate launch` starts them. Without it there is one process, and every function here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")

# Of a process that waits for the first one, which caches a large dataset or generates images alone. torch's own, 10
# minutes with NCCL, would end the run. The launcher ends the processes if one of them fails.
_TIMEOUT = timedelta(days=1)


class FirstFailed(RuntimeError):
    """Raised in the other processes when the first one fails, which raises the cause."""


@dataclass(frozen=True)
class Processes:
    """This process: number `rank` of `count`. Only the first, rank 0, writes files."""

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")  # of the tensors that are exchanged

    @classmethod
    def launched(cls, device: torch.device) -> Processes:
        """Joins the processes that `accelerate launch` has started, and waits for all of them."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=device.type == "cpu", timeout=_TIMEOUT)
        return cls(state.process_index, state.num_processes, device)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, value: Value) -> Value:
        """Returns the first process's value in every process."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        values = [value]
        broadcast_object_list(values)
        return values[0]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        if self.count == 1:
            return flag
        raised = torch.tensor([float(flag)])
        self.add_up([raised])
        return bool(raised.item())

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over all processes, in one all-reduce: all must have the same dtype."""
        if self.count == 1:
            return
        from accelerate.utils import reduce

        own = torch.cat([tensor.flatten() for tensor in tensors]).to(self.device)
        flat: Tensor = reduce(own, "sum")  # type: ignore[assignment]
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    @contextmanager
    def one_after_the_other(self) -> Iterator[None]:
        """Runs the block in the first process, then in the others, which can use the files that it has written.

        If it fails there, the others raise FirstFailed instead of waiting forever.
        """
        if self.is_first:
            try:
                yield
            except BaseException:
                self.share(False)
                raise
            self.share(True)
        elif self.share(True):
            yield
        else:
            raise FirstFailed("the first process of this run failed or was stopped: see its error message")

    def wait(self) -> None:
        """Waits until all processes have reached this point."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()
