"""The device, and the one owner of the weights that stay on it between runs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...sdxl_lora_core.runtime.loaded_parts import LoadedParts
from .comfy import running

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


def device() -> torch.device:
    if running():
        import comfy.model_management

        return comfy.model_management.get_torch_device()
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


class SDXLPart(nn.Module):
    """A model for ComfyUI's ModelPatcher, which sets attributes that diffusers' models forbid."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part: nn.Module | None = part


class ComfyParts(LoadedParts):
    """Loaded parts that ComfyUI may evict. What it takes for other models, or for "Unload models", is freed."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._patchers: dict[str, ModelPatcher] = {}
        self._in_use: set[str] = set()
        self._moving = False

    def arrive(self, part: str, module: nn.Module, room: int = 0) -> None:
        if part not in self._patchers or self._patchers[part].model.part is not module:
            self._patchers[part] = self._evictable(part, module)
        self._in_use.add(part)
        self._load_in_use(room)
        if any(weight.device.type != self.device.type for weight in module.parameters()):
            raise ValueError(
                f"ComfyUI left the {part} off the {self.device.type}, as it does when it is started with --novram: "
                "start it without, because here parts are moved as a whole"
            )

    def rest(self, part: str, offload: bool | None = None) -> None:
        self._in_use.discard(part)
        super().rest(part, offload)

    def leave(self, part: str, module: nn.Module) -> None:
        with self._own_move():
            self._patchers[part].detach()

    def forget(self, part: str, module: nn.Module) -> None:
        self._in_use.discard(part)
        self._patchers.pop(part, None)

    def end_use(self) -> None:
        self._in_use.clear()

    def _load_in_use(self, room: int) -> None:
        import comfy.model_management

        wanted = [self._patchers[name] for name in sorted(self._in_use)]
        with self._own_move():
            comfy.model_management.load_models_gpu(wanted, memory_required=room, force_full_load=True)

    @contextmanager
    def _own_move(self) -> Iterator[None]:
        self._moving = True
        try:
            yield
        finally:
            self._moving = False

    def _evictable(self, part: str, module: nn.Module) -> ModelPatcher:
        from comfy.model_patcher import CallbacksMP

        holder = SDXLPart(module)
        patcher = _whole_patcher()(holder, self.device, torch.device("cpu"))
        patcher.add_callback(CallbacksMP.ON_DETACH, lambda *_: self._evicted(part, holder))
        return patcher

    def _evicted(self, part: str, holder: SDXLPart) -> None:
        if self._moving or self._held.get(part, (None, None))[1] is not holder.part:
            return
        # The weights go, the patcher stays: ComfyUI's list of models may not shrink while it is walked.
        del self._held[part]
        self._in_use.discard(part)
        holder.part = None
        self._drop_unlisted()

    def _drop_unlisted(self) -> None:
        """Parts that had to make room for others of ours rest in memory, where ComfyUI does not see them any more."""
        import comfy.model_management

        listed = [loaded.model for loaded in comfy.model_management.current_loaded_models]
        for part in [part for part in self._held if not any(self._patchers.get(part) is model for model in listed)]:
            self.drop(part)


@functools.cache
def _whole_patcher() -> type[ModelPatcher]:
    from comfy.model_patcher import ModelPatcher

    class WholePatcher(ModelPatcher):
        def partially_unload(self, *args: Any, **kwargs: Any) -> int:
            return 0  # diffusers' layers cannot run from two devices, so ComfyUI has to take the whole part

    return WholePatcher


@functools.cache
def _owner() -> LoadedParts:
    return ComfyParts(device()) if running() else LoadedParts(device())


@contextmanager
def loaded_parts() -> Iterator[LoadedParts]:
    """The one owner of weights that stay between runs. After the block, or its failure, nothing counts as in use."""
    owner = _owner()
    owner.borrowed.clear()
    try:
        yield owner
    finally:
        if isinstance(owner, ComfyParts):
            owner.end_use()


@contextmanager
def training_mode() -> Iterator[None]:
    """Inside, autograd works, though ComfyUI runs nodes in inference mode, and the device's memory is free."""
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
    """Newer ComfyUIs want to know while a node trains."""
    if running():
        import comfy.model_management

        if hasattr(comfy.model_management, "in_training"):
            comfy.model_management.in_training = begins
