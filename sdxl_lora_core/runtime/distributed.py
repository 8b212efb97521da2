"""The processes of one run: each holds the whole model and takes its share of every batch (data parallel).

`accelerate launch` starts them; without it there is one, and nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


class FirstFailed(RuntimeError):
    """Raised in the other processes; the first one has the cause."""


@dataclass(frozen=True)
class Processes:
    """This process, `rank` of `count`. Rank 0 is the first: it alone writes."""

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")  # what messages travel from

    @classmethod
    def launched(cls, device: torch.device) -> Processes:
        """Joins the processes that a launcher has started; waits for all of them."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=device.type == "cpu")
        return cls(state.process_index, state.num_processes, device)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, value: Value) -> Value:
        """The first process's value, in every process."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        values = [value]
        broadcast_object_list(values)
        return values[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process."""
        if self.count == 1:
            return flag
        raised = torch.tensor([float(flag)])
        self.add_up([raised])
        return bool(raised.item())

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes its sum over all processes, in place. All have one number format: it is one message."""
        if self.count == 1:
            return
        from accelerate.utils import reduce

        own = torch.cat([tensor.flatten() for tensor in tensors]).to(self.device)
        flat: Tensor = reduce(own, "sum")  # type: ignore[assignment]
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    @contextmanager
    def one_after_the_other(self) -> Iterator[None]:
        """The first process goes through the block alone, then the others do, and find what it has made.

        If it fails there the others raise FirstFailed instead, so that nobody waits for what never comes.
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
            raise FirstFailed("the first process of this run failed or was stopped: it says why")

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()
