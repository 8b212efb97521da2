"""The device, and the owner of the weights that stay loaded between runs, under ComfyUI's memory management."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...sdxl_lora_core.runtime.device import DeviceMemory, default_device, trim_heap
from ...sdxl_lora_core.runtime.loaded_parts import LoadedParts
from .comfy import running

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


def device() -> torch.device:
    if running():
        import comfy.model_management

        return comfy.model_management.get_torch_device()
    return default_device()


class SDXLPart(nn.Module):
    """Wraps a model for ComfyUI's ModelPatcher, which sets attributes that diffusers' models reject."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part: nn.Module | None = part


class ComfyParts(LoadedParts):
    """Loaded parts that ComfyUI may evict for other models or by "Unload models", which frees their memory."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._patchers: dict[str, Any] = {}
        self.in_use: set[str] = set()  # the parts that are needed now
        self._moving = False

    def to_device(self, name: str, module: nn.Module, room: int = 0) -> None:
        if name not in self._patchers or self._patchers[name].model.part is not module:
            self._patchers[name] = self._evictable(name, module)
        self.in_use.add(name)
        self._patchers[name].resting = False
        self._load_in_use(room)
        if any(weight.device.type != self.device.type for weight in module.parameters()):
            raise ValueError(
                f"ComfyUI did not load the {name} to the {self.device.type}, as with --novram: start it without that "
                "option, because this pack loads each part as a whole"
            )

    def finish(self, name: str, offload: bool | None = None) -> None:
        self.in_use.discard(name)
        super().finish(name, offload)

    def to_cpu(self, name: str, module: nn.Module) -> None:
        with self._own_move():
            self._patchers[name].detach()
        self._patchers[name].resting = True

    def released(self, name: str, module: nn.Module) -> None:
        self.in_use.discard(name)
        self._patchers.pop(name, None)

    def _load_in_use(self, room: int) -> None:
        import comfy.model_management

        wanted = [self._patchers[name] for name in sorted(self.in_use)]
        with self._own_move():
            comfy.model_management.load_models_gpu(wanted, memory_required=room, force_full_load=True)

    @contextmanager
    def _own_move(self) -> Iterator[None]:
        self._moving = True
        try:
            yield
        finally:
            self._moving = False

    def _evictable(self, part: str, module: nn.Module) -> Any:
        from comfy.model_patcher import CallbacksMP

        holder = SDXLPart(module)
        patcher = _whole_patcher()(holder, self.device, torch.device("cpu"))
        patcher.add_callback(CallbacksMP.ON_DETACH, lambda *_: self._evicted(part, holder))
        return patcher

    def _evicted(self, part: str, holder: SDXLPart) -> None:
        if self._moving or sys.is_finalizing():  # ComfyUI's patchers detach their models when the process ends, too
            return
        if part not in self._held or self._held[part][1].module is not holder.part:
            return
        # Drop the weights but keep the patcher: ComfyUI's list of models must not shrink while it is iterated.
        del self._held[part]
        self.in_use.discard(part)
        holder.part = None
        self._drop_unlisted()
        trim_heap()

    def _drop_unlisted(self) -> None:
        """Drops parts that were offloaded for other parts of ours: they use memory that ComfyUI no longer manages."""
        import comfy.model_management

        listed = [loaded.model for loaded in comfy.model_management.current_loaded_models]
        for part in [part for part in self._held if not any(self._patchers.get(part) is model for model in listed)]:
            self.drop(part)


@functools.cache
def _whole_patcher() -> type[ModelPatcher]:
    from comfy.model_patcher import ModelPatcher

    class WholePatcher(ModelPatcher):
        resting = False  # held in main memory, with nothing on the device

        def partially_unload(self, *args: Any, **kwargs: Any) -> int:
            return 0  # diffusers' layers cannot run on two devices, so ComfyUI must evict the whole part

        def model_size(self) -> int:
            # ComfyUI evicts first what has the most beside the device. A resting part is to be last: it frees nothing.
            return -1 if self.resting else super().model_size()

    return WholePatcher


@functools.cache
def _owner() -> LoadedParts:
    return ComfyParts(device()) if running() else LoadedParts(device())


@contextmanager
def loaded_parts() -> Iterator[LoadedParts]:
    """The owner of weights that stay loaded between runs. After the block none of them is in use."""
    owner = _owner()
    try:
        yield owner
    finally:
        if isinstance(owner, ComfyParts):
            owner.in_use.clear()


class ComfyMemory(DeviceMemory):
    """What ComfyUI leaves to a training: without --reserve-vram, and as little as possible with --lowvram."""

    @property
    def least(self) -> bool:
        from comfy.cli_args import args

        return bool(args.lowvram or args.novram)

    def free(self) -> float:
        import comfy.model_management

        unused = comfy.model_management.get_free_memory(self.device)
        return max(0.0, unused - comfy.model_management.extra_reserved_memory())

    def take(self, size: int) -> None:
        import comfy.model_management

        reserved = comfy.model_management.extra_reserved_memory()
        comfy.model_management.free_memory(size + reserved, self.device)


def device_memory() -> DeviceMemory:
    return ComfyMemory(device()) if running() else DeviceMemory(device())


@contextmanager
def training_mode() -> Iterator[None]:
    """Frees the device's memory and enables autograd, as ComfyUI runs nodes in inference mode."""
    _owner().drop_all()
    _unload_other_models()
    _announce_training(True)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        _announce_training(False)


def _unload_other_models() -> None:
    if running():
        import comfy.model_management

        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()


def _announce_training(begins: bool) -> None:
    """Tells newer versions of ComfyUI that a node is training."""
    if running():
        import comfy.model_management

        if hasattr(comfy.model_management, "in_training"):
            comfy.model_management.in_training = begins
