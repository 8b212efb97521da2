"""How a run fits into memory: gradient checkpointing and images a pass, planned from what a forward pass keeps.

What a pass keeps for its backward pass is counted on tensors without contents, so the count costs no memory and holds
for this UNet, this adapter and this size of images, whatever they are. It takes seconds, so it is kept on disk.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...cache.tensor_cache import minor_version
from ...files import json_sha256, write_text_atomic
from ..config.memory import Checkpointing

_OVERHEAD = 1.15  # of what a pass keeps: the tensors that the backward pass makes on its way
_RESERVE = 512 * 2**20  # bytes for the libraries' own workspace
_GEGLU = "GEGLU"


@dataclass(frozen=True)
class MemoryPlan:
    """What a run does to fit. `reason` is a sentence for the report; `tight` if even so it may not fit."""

    checkpointing: Checkpointing
    images_per_pass: int
    reason: str
    tight: bool = False


def plan_memory(
    measure: Callable[[], int], unet: nn.Module, wanted: Checkpointing, batch_size: int, learning: int, free: float
) -> MemoryPlan:
    """The fastest way that fits into `free` bytes.

    `measure` gives the bytes that one image of the largest size keeps in the UNet's present mode. Halving the pass
    costs least and comes first, then recomputing the feed-forward layers, then recomputing every block. `wanted` other
    than auto leaves only the pass to choose. `learning` are the bytes of gradients, optimizer state and averages.
    """
    fixed = _RESERVE + learning
    modes: tuple[Checkpointing, ...] = ("off", "selective", "on") if wanted == "auto" else (wanted,)
    needed = 0
    for mode in modes:
        set_checkpointing(unet, mode)
        an_image = measure()
        images = batch_size
        while images > 1 and fixed + _OVERHEAD * an_image * images > free:
            images = (images + 1) // 2
        needed = int(fixed + _OVERHEAD * an_image * images)
        if needed <= free:
            return MemoryPlan(mode, images, _reason(mode, images, needed, free))
    return MemoryPlan(modes[-1], 1, _reason(modes[-1], 1, needed, free), tight=True)


def _reason(mode: Checkpointing, images: int, needed: int, free: float) -> str:
    return (
        f"gradient checkpointing {mode}, {images} images a pass: "
        f"about {needed / 1e9:.1f} GB needed of {free / 1e9:.1f} GB free"
    )


def kept_bytes(forward: Callable[[], object], model: nn.Module, inputs: Sequence[object], cache: Path) -> int:
    """Bytes that `forward` keeps for its backward pass, the model's own weights left out. Nothing is computed.

    `inputs`, which JSON can hold, say what decides the shapes: the same model in the same mode keeps the same for the
    same shapes, and is counted once for all runs with this `cache`.
    """
    note = cache / "memory" / "v1" / f"{json_sha256(_decisive(model, inputs))}.json"
    known = _read_count(note)
    if known is None:
        known = _count(forward, model)
        with contextlib.suppress(OSError):  # a full or read-only disk only costs the next run a second count
            write_text_atomic(note, json.dumps({"kept_bytes": known}))
    return known


def _read_count(note: Path) -> int | None:
    """None where there is none, or one that a crash or a hand damaged."""
    try:
        known = json.loads(note.read_text(encoding="ascii"))["kept_bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return known if type(known) is int and known >= 0 else None


def _decisive(model: nn.Module, inputs: Sequence[object]) -> dict[str, object]:
    """All that a count depends on. What this module and the adapters' own layers do is in the number of its folder."""
    device = next(model.parameters()).device
    return {
        "modules": [_mode(name, module) for name, module in model.named_modules()],
        "inputs": inputs,
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

    kept: dict[int, torch.UntypedStorage] = {}  # as long as they live, their addresses are theirs alone

    def note(tensor: Tensor) -> None:
        """Returns nothing: a graph that holds its own tensors is a cycle through C++ that no collection frees."""
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
    raise AssertionError("the memory plan's pass goes forward only")


def set_checkpointing(unet: Any, mode: Checkpointing) -> None:
    """off: keeps all. selective: computes the middle of feed-forward layers again. on: computes every block again."""
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
