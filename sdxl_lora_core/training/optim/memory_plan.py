"""Plans how a run fits into memory: gradient checkpointing and images per pass.

The plan is based on the bytes that a forward pass saves for its backward pass. They are measured on fake tensors, which
takes no memory and is exact for this UNet, adapter and image size. It takes seconds, so the result is cached on disk.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...cache.tensor_cache import minor_version
from ...files import json_sha256, write_text_atomic
from ..config.memory import Checkpointing

_OVERHEAD = 1.15  # factor on the saved bytes for temporary tensors of the backward pass
_RESERVE = 512 * 2**20  # bytes for the workspace of libraries
_GEGLU = "GEGLU"


@dataclass(frozen=True)
class MemoryPlan:
    """How a run uses memory. `reason` is a sentence for the report; `tight` says that it may not fit nevertheless."""

    checkpointing: Checkpointing
    images_per_pass: int
    reason: str
    tight: bool = False


@dataclass(frozen=True)
class Measured:
    """The forward pass of one image of the largest size through `model`, to be measured.

    `shapes`, JSON values, are what the shapes of its tensors depend on. `folder` caches the results: the same model in
    the same mode saves the same for the same shapes, so it is measured once for all runs.
    """

    forward: Callable[[], object]
    model: Any
    shapes: Sequence[object]
    folder: Path

    def saved_bytes(self) -> int:
        """Bytes saved for the backward pass, without the model's own weights. Nothing is computed."""
        note = self.folder / f"{json_sha256(_dependencies(self.model, self.shapes))}.json"
        known = _read_count(note)
        if known is None:
            known = _count(self.forward, self.model)
            with contextlib.suppress(OSError):  # on a full or read-only disk the next run measures again
                write_text_atomic(note, json.dumps({"kept_bytes": known}))
        return known


def plan_memory(
    measured: Measured, requested: Checkpointing, batch_size: int, training_bytes: int, free: float
) -> MemoryPlan:
    """The fastest plan that fits into `free` bytes.

    Halving the pass costs least and comes first, then recomputing the feed-forward layers, then recomputing every
    block. If `requested` is not auto, only the images per pass are chosen. `training_bytes` are those of gradients,
    optimizer state and averages.
    """
    fixed = _RESERVE + training_bytes
    modes: tuple[Checkpointing, ...] = ("off", "selective", "on") if requested == "auto" else (requested,)
    needed = 0
    for mode in modes:
        set_checkpointing(measured.model.unet, mode)
        an_image = measured.saved_bytes()
        images = batch_size
        while images > 1 and fixed + _OVERHEAD * an_image * images > free:
            images = (images + 1) // 2
        needed = int(fixed + _OVERHEAD * an_image * images)
        if needed <= free:
            return MemoryPlan(mode, images, _reason(mode, images, needed, free))
    return MemoryPlan(modes[-1], 1, _reason(modes[-1], 1, needed, free), tight=True)


def _reason(mode: Checkpointing, images: int, needed: int, free: float) -> str:
    room = "an unknown amount of memory" if math.isinf(free) else f"{free / 1e9:.1f} GB free"
    return f"gradient checkpointing {mode}, {images} images a pass: about {needed / 1e9:.1f} GB needed of {room}"


def _read_count(note: Path) -> int | None:
    """The cached result; None if there is none or it is damaged."""
    try:
        known = json.loads(note.read_text(encoding="ascii"))["kept_bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return known if type(known) is int and known >= 0 else None


def _dependencies(model: nn.Module, shapes: Sequence[object]) -> dict[str, object]:
    """Everything that a result depends on. The code of this module is identified by the version of the folder."""
    device = next(model.parameters()).device
    return {
        "modules": [_mode(name, module) for name, module in model.named_modules()],
        "inputs": shapes,
        "device": [device.type, *(torch.cuda.get_device_capability(device) if device.type == "cuda" else ())],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "libraries": {name: minor_version(name) for name in ("torch", "diffusers", "peft", "transformers")},
    }


def _mode(name: str, module: nn.Module) -> list[object]:
    return [
        name,
        type(module).__name__,
        module.extra_repr(),
        [[list(own.shape), str(own.dtype), own.requires_grad] for own in module.parameters(recurse=False)],
        module.training,
        "forward" in vars(module),
        getattr(module, "gradient_checkpointing", False),
    ]


def _count(forward: Callable[[], object], model: nn.Module) -> int:
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def note(tensor: Tensor) -> None:
        """Returns None: a graph that holds its own tensors is a cycle through C++ that is never collected."""
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter) and storage._cdata not in weights:
            kept[storage._cdata] = storage

    with torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        without_contents = [mode.from_tensor(weight) for weight in model.parameters()]
        weights = {weight.untyped_storage()._cdata for weight in without_contents}
        with torch.autograd.graph.saved_tensors_hooks(note, _never_unpacked):
            forward()
        return sum(storage.nbytes() for storage in kept.values())


def _never_unpacked(_: object) -> Tensor:
    raise AssertionError("the memory plan runs no backward pass")


def set_checkpointing(unet: Any, mode: Checkpointing) -> None:
    """off: saves everything. selective: recomputes the feed-forward layers. on: recomputes every block."""
    unet.disable_gradient_checkpointing()
    for module in unet.modules():
        if type(module).__name__ == _GEGLU:
            vars(module).pop("forward", None)
            if mode == "selective":
                module.forward = functools.partial(_recomputed, module.forward)
    if mode == "on":
        unet.enable_gradient_checkpointing()


def _recomputed(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
