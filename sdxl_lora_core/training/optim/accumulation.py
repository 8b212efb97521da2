"""The gradient of an update: cut into passes that fit the memory, added up over passes and processes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ...hashed_random import generator
from ...runtime.device import free_memory, is_out_of_memory, release_memory
from ...runtime.distributed import Processes
from ..config.train_config import TrainConfig, learning_encoders
from ..data.batches import Batch, TrainingData
from ..model.trainable import Learner
from ..run.loop_state import LoopState
from .memory_plan import kept_bytes, plan_memory, set_checkpointing
from .optimizers import state_copies

log = logging.getLogger("sdxl_lora")


class Gradients:
    """Computes what `learner` learns from an update's images. `scaler` is fp16's loss scale."""

    def __init__(
        self,
        learner: Learner,
        data: TrainingData,
        config: TrainConfig,
        scaler: torch.amp.GradScaler,
        processes: Processes,
    ) -> None:
        self.learner, self.data, self.config = learner, data, config
        self.scaler, self.processes = scaler, processes

    def plan(self, state: LoopState) -> None:
        """Chooses how the run fits, before its first step. One that goes on keeps the choice."""
        config, learner, free = self.config, self.learner, free_memory(self.data.device)
        if config.memory_limit_gb:
            free = min(free, config.memory_limit_gb * 1e9)
        areas = [width * height for width, height in self.data.buckets]
        images = config.images_per_pass or config.batch_size
        batch = self.data.batch([areas.index(max(areas))], 0, 0)
        learner.train()
        if config.adapter in ("loha", "lokr"):  # they draw whether they act, which no count can follow
            learner.eval()
        copies = 1 + state_copies(config) + bool(config.ema_decay)
        shapes = what_decides_shapes(batch, config)
        plan = plan_memory(
            lambda: kept_bytes(lambda: learner.predict(batch), learner, shapes, self.data.cache_folder),
            learner.unet,
            config.gradient_checkpointing,
            images,
            copies * size_of(learner.learning),
            free,
        )
        state.gradient_checkpointing, state.images_per_pass = plan.checkpointing, plan.images_per_pass
        state.memory = f"{str(learner.dtype).removeprefix('torch.')}, {plan.reason}"
        if plan.tight:
            log.warning("this run may not fit, or spill into memory that is many times slower: %s", plan.reason)

    def of_update(self, state: LoopState) -> float:
        """Leaves the gradient of the mean loss over the effective batch in the parameters and returns that loss.

        Raises torch.OutOfMemoryError when nothing more can be saved; until then `state` takes smaller passes.
        """
        while True:
            try:
                return self._accumulate(state)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                cause = str(error)
            self._need_less_memory(state, cause)  # out of the except block, whose traceback keeps the failed graph

    def clear(self) -> None:
        for parameter in self.learner.learning:
            parameter.grad = None

    def _need_less_memory(self, state: LoopState, cause: str) -> None:
        """Halves the pass, then turns gradient checkpointing on; raises torch.OutOfMemoryError if nothing is left.

        The batch and its random numbers stay as they are; sums are rounded in another order, and layer dropout draws
        its masks anew for each pass.
        """
        self.clear()
        release_memory(self.data.device)
        step, images = state.step + 1, state.images_per_pass
        if images > 1:
            state.images_per_pass = (images + 1) // 2
            log.warning(
                "out of memory at step %d: from here %d images a pass, not %d", step, state.images_per_pass, images
            )
        elif self.config.gradient_checkpointing == "auto" and state.gradient_checkpointing != "on":
            state.gradient_checkpointing = "on"
            set_checkpointing(self.learner.unet, "on")
            log.warning("out of memory at step %d: gradient checkpointing is on from here, steps take longer", step)
        else:
            remedy = "" if state.gradient_checkpointing == "on" else "set gradient_checkpointing to auto, or "
            raise torch.OutOfMemoryError(
                f"out of memory at step {step} with a single image a pass: {remedy}lower the dataset's resolution "
                f"or the rank (now {self.config.rank}), or close what else uses the memory ({cause})"
            )

    def _accumulate(self, state: LoopState) -> float:
        batches = self.data.micro_batches(state.step)
        total = sum(len(indices) for indices in batches)
        self.learner.train()
        loss = 0.0
        for position, indices in passes(batches, state.images_per_pass, self.processes):
            batch = self.data.batch(indices, state.step, position, apart=self.processes.count)
            with layer_dropout(self.config, state.step, position, self.data.device):
                part = self.learner.losses(batch).sum() / total
                self.scaler.scale(part).backward()
            loss += part.item()
        return self._sum_over_processes(loss)

    def _sum_over_processes(self, loss: float) -> float:
        """Adds the other processes' gradients to this one's, and their losses to `loss`."""
        gradients = []
        for parameter in self.learner.learning:
            if parameter.grad is None:  # no image of the update was this process's, or SDXL skips the encoder's layer
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        if self.processes.count == 1:
            return loss
        total = torch.tensor([loss], device=self.data.device)
        self.processes.add_up([total, *gradients])
        return total.item()


def passes(batches: Sequence[Sequence[int]], size: int, processes: Processes) -> Iterator[tuple[int, Sequence[int]]]:
    """This process's share of the batches, cut into forward passes of at most `size` images.

    An image's position in the whole update says whose it is. Each pass comes with the position of its first image; the
    next ones are `processes.count` apart.
    """
    before = 0
    for batch in batches:
        first = (processes.rank - before) % processes.count
        mine = batch[first :: processes.count]
        for start in range(0, len(mine), size):
            yield before + first + start * processes.count, mine[start : start + size]
        before += len(batch)


@contextmanager
def layer_dropout(config: TrainConfig, step: int, position: int, device: torch.device) -> Iterator[None]:
    """Seeds the dropout layers by step and position and puts the global random state back afterwards."""
    if not (config.dropout or config.rank_dropout or config.module_dropout):
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(generator(config.seed, step, position).initial_seed())
        yield


def what_decides_shapes(batch: Batch, config: TrainConfig) -> list[object]:
    """How large the tensors of the forward pass are. Encoders that learn read the captions in it, whatever the length.

    Only then do the captions matter: other data sets share a count.
    """
    shapes: list[object] = [list(batch.latents.shape), None if batch.embeds is None else list(batch.embeds.shape)]
    if learning_encoders(config):
        shapes += [batch.captions, config.caption_chunks, config.new_tokens, config.vectors_per_token]
    return shapes


def size_of(tensors: Sequence[Tensor]) -> int:
    """In bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
