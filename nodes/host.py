"""The only file that knows ComfyUI: its folders, its memory, its progress bar, its interrupt.

Where ComfyUI is absent the same calls work on one folder, named by SDXL_LORA_HOME: results go into it, and `input/`,
`datasets/`, `models/`, `user/` and `temp/` lie in it.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..sdxl_lora_core.loaded_parts import LoadedParts

PREVIEW_SIDE = 512
PREVIEWED = 4  # images of a batch
SAVED = ("loras", "checkpoints", "diffusers", "embeddings")  # what this pack writes into folders of output/


class Nothing:
    """Stands in for ComfyUI's ExecutionBlocker: a node that receives it does not run."""


def _comfy(module: str) -> Any:
    """A module of the ComfyUI that loaded this pack; None where there is none."""
    return importlib.import_module(module) if "folder_paths" in sys.modules else None


# Folders


def _home() -> Path:
    return Path(os.environ.get("SDXL_LORA_HOME", "out")).absolute()


def _directory(name: str, at_home: str) -> Path:
    comfy = _comfy("folder_paths")
    return Path(getattr(comfy, f"get_{name}_directory")()) if comfy else _home() / at_home


def output_folder() -> Path:
    return _directory("output", ".")


def input_folder() -> Path:
    return _directory("input", "input")


def temp_folder() -> Path:
    return _directory("temp", "temp")


def roots(folder_type: str) -> list[Path]:
    """The folders of one of ComfyUI's folder types, or of our own: clip_score, sdxl_lora_cache."""
    comfy = _comfy("folder_paths")
    if comfy is None:
        at_home = {
            "datasets": [_home() / "datasets"],
            **{kind: [_home() / "models" / kind, _home() / kind] for kind in SAVED},
            "sdxl_lora_cache": [_home() / "user/sdxl_lora"],
        }
        return at_home.get(folder_type, [_home() / "models" / folder_type])
    # extra_model_paths.yaml was read before: what it names stays.
    types = comfy.folder_names_and_paths
    types.setdefault("clip_score", ([os.path.join(comfy.models_dir, "clip_score")], set()))
    types.setdefault("sdxl_lora_cache", ([os.path.join(comfy.get_user_directory(), "sdxl_lora")], set()))
    return [Path(folder) for folder in types.get(folder_type, ([],))[0]]


def file_names(folder_type: str) -> list[str]:
    """Names of all files in those folders, relative to them."""
    comfy = _comfy("folder_paths")
    if comfy:
        return comfy.get_filename_list(folder_type)  # remembered until a folder changes
    return sorted(
        str(path.relative_to(root)) for root in roots(folder_type) for path in root.rglob("*") if path.is_file()
    )


def cache_folder() -> Path:
    """Where latents, prompts, images and hashes are kept between runs."""
    return roots("sdxl_lora_cache")[0]


def add_output_folders() -> None:
    """Where ComfyUI finds what this pack saves, besides the folders of output/ that it knows by itself.

    Its own nodes then read new tokens: a prompt with `embedding:my_lora-ohwx`.
    """
    comfy = _comfy("folder_paths")
    for kind in ("embeddings", "diffusers") if comfy else ():
        comfy.add_model_folder_path(kind, str(output_folder() / kind))


def metadata(graph: dict[str, Any]) -> dict[str, Any] | None:
    """The graph, for files that say how they were made; None where the user started ComfyUI with --disable-metadata."""
    options = getattr(_comfy("comfy.cli_args"), "args", None)
    return None if getattr(options, "disable_metadata", False) else graph


# Devices and memory


def device() -> torch.device:
    management = _comfy("comfy.model_management")
    if management:
        return management.get_torch_device()
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
        self._patchers: dict[str, Any] = {}
        self._in_use: set[str] = set()
        self._moving = False

    def arrive(self, part: str, module: nn.Module, room: int = 0) -> None:
        if part not in self._patchers or self._patchers[part].model.part is not module:
            self._patchers[part] = self._evictable(part, module)
        self._in_use.add(part)
        with self._own_move():
            wanted = [self._patchers[name] for name in sorted(self._in_use)]
            management = _comfy("comfy.model_management")
            management.load_models_gpu(wanted, memory_required=room, force_full_load=True)
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

    @contextmanager
    def _own_move(self) -> Iterator[None]:
        self._moving = True
        try:
            yield
        finally:
            self._moving = False

    def _evictable(self, part: str, module: nn.Module) -> Any:
        holder = SDXLPart(module)
        patcher = _whole_patcher()(holder, self.device, torch.device("cpu"))
        callbacks = _comfy("comfy.model_patcher").CallbacksMP
        patcher.add_callback(callbacks.ON_DETACH, lambda *_: self._evicted(part, holder))
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
        listed = [loaded.model for loaded in _comfy("comfy.model_management").current_loaded_models]
        for part in [part for part in self._held if not any(self._patchers.get(part) is model for model in listed)]:
            self.drop(part)


@functools.cache
def _whole_patcher() -> Any:
    class WholePatcher(_comfy("comfy.model_patcher").ModelPatcher):
        def partially_unload(self, *args: Any, **kwargs: Any) -> int:
            return 0  # diffusers' layers cannot run from two devices, so ComfyUI has to take the whole part

    return WholePatcher


@functools.cache
def _owner() -> LoadedParts:
    return ComfyParts(device()) if _comfy("folder_paths") else LoadedParts(device())


@contextmanager
def parts() -> Iterator[LoadedParts]:
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
    management = _comfy("comfy.model_management")
    if management:
        management.unload_all_models()
        management.soft_empty_cache()
    announces = hasattr(management, "in_training")
    try:
        if announces:
            management.in_training = True
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        if announces:
            management.in_training = False


# Core's models


def with_lora(patcher: Any, kind: str, changes: Sequence[tuple[dict[str, Tensor], float]]) -> tuple[Any, list[str]]:
    """Core's MODEL or CLIP (`kind`) with what a LoRA changes at a strength, and the modules that it does not have.

    `changes` have kohya's keys. What came in stays as it is.
    """
    lora = _comfy("comfy.lora")
    if kind == "MODEL":
        keys = lora.model_lora_keys_unet(patcher.model, {})
    else:
        keys = lora.model_lora_keys_clip(patcher.cond_stage_model, {})
    changed = patcher.clone()
    missing: list[str] = []
    for tensors, strength in changes:
        missing += dict.fromkeys(name for key in tensors if (name := key.partition(".")[0]) not in keys)
        changed.add_patches(lora.load_lora(tensors, keys, log_missing=False), strength)
    return changed, missing


# Progress


class Progress:
    """Shows progress on the node and in the terminal. Every call is a point where the user's cancel takes effect."""

    def __init__(self) -> None:
        self._phase: tuple[str, int] | None = None
        self._terminal: Any = None
        self._node: Any = None
        self._marks: deque[tuple[int, float]] = deque(maxlen=20)  # items done, and when
        self._picture: np.ndarray | None = None

    @functools.cached_property
    def _previewer(self) -> Any:
        """What ComfyUI makes pictures of latents with; None where its user wants no previews."""
        previews, formats = _comfy("latent_preview"), _comfy("comfy.latent_formats")
        return previews.get_previewer(device(), formats.SDXL()) if previews else None

    def on_estimate(self, latents: Tensor) -> None:
        """Takes latents [B, 4, h, w] in the UNet's scale, a picture of which the next call shows."""
        if self._previewer:
            shown = [np.asarray(self._previewer.decode_latent_to_preview(one[None])) for one in latents[:PREVIEWED]]
            self._picture = np.concatenate(shown, axis=1)

    def __call__(
        self, done: int, total: int, phase: str = "", detail: str = "", preview: np.ndarray | None = None
    ) -> None:
        """`detail` is a line of numbers, `preview` a picture to show on the node, uint8 [H, W, 3]."""
        if self._phase != (phase, total):
            self._begin(done, total, phase)
        self._terminal.set_postfix_str(detail, refresh=False)
        self._terminal.update(done - self._terminal.n)
        if self._node:
            shown, self._picture = (self._picture if preview is None else preview), None
            picture = None if shown is None else ("JPEG", Image.fromarray(shown), PREVIEW_SIDE)
            self._node.update_absolute(done, total, picture)
            if phase:
                numbers = detail or self._time_left(done, total)
                _show_text("\n".join([f"{phase}: {done} of {total}", *numbers.split(", ")]).rstrip())
            _comfy("comfy.model_management").throw_exception_if_processing_interrupted()

    def close(self) -> None:
        if self._terminal:
            self._terminal.close()

    def _time_left(self, done: int, total: int) -> str:
        """At the speed of late. What came before the first item is done, such as loading, says nothing about speed."""
        if done and (not self._marks or done > self._marks[-1][0]):
            self._marks.append((done, time.monotonic()))
        if len(self._marks) < 2:
            return ""
        (first, since), (last, now) = self._marks[0], self._marks[-1]
        return f"{self._terminal.format_interval((now - since) / (last - first) * (total - done))} left"

    def _begin(self, done: int, total: int, phase: str) -> None:
        from tqdm import tqdm

        self.close()
        self._phase = (phase, total)
        self._marks.clear()
        self._terminal = tqdm(initial=done, total=total, desc=phase or None, leave=False)
        comfy = _comfy("comfy.utils")
        self._node = comfy.ProgressBar(total) if comfy else None


def _show_text(text: str) -> None:
    """Beside the bar of the node that runs. Older ComfyUIs have no such text."""
    server = getattr(_comfy("server"), "PromptServer", None)
    context = getattr(_comfy("comfy_execution.utils"), "get_executing_context", lambda: None)()
    send = getattr(getattr(server, "instance", None), "send_progress_text", None)
    if context and send:
        send(text, context.node_id)


@contextmanager
def progress() -> Iterator[Progress]:
    bar = Progress()
    try:
        yield bar
    finally:
        bar.close()


# Stop and keep


class StopButton:
    """Finishes a training early and keeps its LoRA."""

    def __init__(self) -> None:
        self._wanted: threading.Event | None = None

    @contextmanager
    def offered(self) -> Iterator[Callable[[], bool]]:
        """While a training runs; the callable says whether it is to finish."""
        self._wanted = wanted = threading.Event()
        try:
            yield wanted.is_set
        finally:
            self._wanted = None

    def press(self) -> bool:
        """Whether there was a training to stop."""
        wanted = self._wanted
        if wanted is not None:
            wanted.set()
        return wanted is not None


stop_button = StopButton()


def add_routes() -> None:
    """POST /sdxl_lora/stop presses the stop button. Its answer has status 409 when nothing trains."""
    if "folder_paths" not in sys.modules or "server" not in sys.modules:
        return

    async def stop(_: Any) -> Any:
        stopping = stop_button.press()
        answer = importlib.import_module("aiohttp.web").json_response
        return answer({"stopping": stopping}, status=200 if stopping else 409)

    sys.modules["server"].PromptServer.instance.routes.post("/sdxl_lora/stop")(stop)


def nothing() -> Any:
    """The output that keeps whatever hangs on it from running."""
    graph = _comfy("comfy_execution.graph_utils")
    return graph.ExecutionBlocker(None) if graph else Nothing()
