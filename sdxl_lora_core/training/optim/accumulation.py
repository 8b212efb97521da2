"""The gradient of an update, accumulated over forward passes that fit into memory and over processes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ...dataset.caption_dataset import image_count
from ...hashed_random import generator
from ...runtime.device import is_out_of_memory, release_memory, seeded
from ...runtime.distributed import Processes
from ..config.train_config import TrainConfig
from ..data.batches import PassOfUpdate
from ..data.feed import Feed
from ..model.checkpointing import set_checkpointing
from ..model.trainable import TrainableSDXL
from ..run.loop_state import LoopState

log = logging.getLogger("sdxl_lora")


class Gradients:
    """Computes the gradients of a model over the images of an update. `scaler` is the loss scaler of fp16."""

    def __init__(
        self, model: TrainableSDXL, feed: Feed, config: TrainConfig, scaler: torch.amp.GradScaler, processes: Processes
    ) -> None:
        self.model, self.feed, self.config = model, feed, config
        self.scaler, self.processes = scaler, processes

    def of_update(self, state: LoopState) -> Tensor:
        """Stores the gradient of the mean loss over the effective batch in the parameters.

        Returns terms that add up to that loss, float32 [N], on the device, so that nothing has to wait for it.
        If memory runs out, `state` is changed to smaller passes or more checkpointing. Raises torch.OutOfMemoryError
        when neither is left.
        """
        while True:
            try:
                return self._accumulate(state)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                cause = str(error)
            self._reduce_memory(state, cause)  # outside of the except block, whose traceback keeps the failed graph

    def clear(self) -> None:
        self.model.flat.clear_gradients()

    def _reduce_memory(self, state: LoopState, cause: str) -> None:
        """Halves the pass, then turns gradient checkpointing on.

        The batch and its random numbers stay the same; sums are rounded in another order, and layer dropout samples new
        masks for each pass.
        """
        self.clear()
        release_memory(self.feed.device)
        step, images = state.step + 1, state.images_per_pass
        if images > 1:
            state.images_per_pass = (images + 1) // 2
            fewer = image_count(state.images_per_pass)
            self._note(state, f"from here {fewer} a pass, not {images}")
        elif self.config.gradient_checkpointing == "auto" and state.gradient_checkpointing != "on":
            state.gradient_checkpointing = "on"
            set_checkpointing(self.model.unet, "on")
            self._note(state, "gradient checkpointing is on from here, steps take longer")
        else:
            remedy = "" if state.gradient_checkpointing == "on" else "set gradient_checkpointing to auto, or "
            remedy += "" if state.offloaded_blocks else "set offload_blocks to 1000, or "
            raise torch.OutOfMemoryError(
                f"out of memory at step {step} with a single image a pass: {remedy}lower the dataset's resolution "
                f"or the rank (now {self.config.rank}), or close other programs that use the memory ({cause})"
            )

    def _note(self, state: LoopState, change: str) -> None:
        note = f"out of memory at step {state.step + 1}: {change}"
        log.warning(note)
        state.memory = f"{state.memory}; {note}"

    def _accumulate(self, state: LoopState) -> Tensor:
        own, following = self._passes(state.step, state), self._passes(state.step + 1, state)[:1]
        images = sum(map(len, self.feed.data.micro_batches(state.step)))
        self.model.train()
        losses = [torch.zeros((), device=self.feed.device)]
        self.scaler.scale(losses[0])  # a scaler that has scaled nothing, in a process without an image, raises later
        for number, current in enumerate(own):
            batch = self.feed.batch(current, next(iter([*own[number + 1 :], *following]), None))
            with layer_dropout(self.config, current.step, current.first, self.feed.device):
                loss = self.model.losses(batch).sum() / images
                self.scaler.scale(loss).backward()
            self.model.flat.collect()
            losses.append(loss.detach())
        return self._sum_over_processes(torch.stack(losses))

    def _passes(self, step: int, state: LoopState) -> list[PassOfUpdate]:
        """This process's passes of an update; none after the last one."""
        if step >= self.config.steps:
            return []
        return list(passes(step, self.feed.data.micro_batches(step), state.images_per_pass, self.processes))

    def _sum_over_processes(self, losses: Tensor) -> Tensor:
        """Adds the other processes' gradients to this one's. Returns the losses of all of them."""
        if self.processes.count == 1:
            return losses
        total = losses.sum(0, keepdim=True)
        self.processes.add_up([total, self.model.flat.gradients])
        return total


def passes(step: int, batches: Sequence[Sequence[int]], size: int, processes: Processes) -> Iterator[PassOfUpdate]:
    """This process's share of an update's batches, divided into forward passes of at most `size` images.

    An image's position in the whole update decides which process trains on it.
    """
    before = 0
    for batch in batches:
        first = (processes.rank - before) % processes.count
        mine = batch[first :: processes.count]
        for start in range(0, len(mine), size):
            indices = tuple(mine[start : start + size])
            yield PassOfUpdate(step, indices, before + first + start * processes.count, processes.count)
        before += len(batch)


@contextmanager
def layer_dropout(config: TrainConfig, step: int, position: int, device: torch.device) -> Iterator[None]:
    """Seeds the dropout layers by step and position, and restores the global random state afterwards."""
    if not (config.dropout or config.rank_dropout or config.module_dropout):
        yield
        return
    with seeded(generator(config.seed, step, position).initial_seed(), device):
        yield
