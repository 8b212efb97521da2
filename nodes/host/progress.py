"""Progress on the running node and in the terminal, and cancelling."""

from __future__ import annotations

import functools
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from PIL import Image
from torch import Tensor

from ...sdxl_lora_core.messages import brief
from ...sdxl_lora_core.sdxl.family import Family
from .comfy import running
from .memory import device
from .status import board

if TYPE_CHECKING:
    from comfy.utils import ProgressBar
    from latent_preview import LatentPreviewer

    from ...sdxl_lora_core.training.monitor.progress import StepReport

log = logging.getLogger("sdxl_lora")

PREVIEW_SIDE = 512
NUMBERS = ("loss", "smoothed", "learning_rate", "images_per_second", "memory", "seconds_left")
PREVIEWED = 4  # images of a batch


class Progress:
    """Shows progress on the node and in the terminal. Every call raises if the user has cancelled the run."""

    def __init__(self) -> None:
        self._status = board.begin()
        self._phase: tuple[str, int] | None = None
        self._terminal: Any = None
        self._node: ProgressBar | None = None
        self._marks: deque[tuple[int, float]] = deque(maxlen=20)  # items done, and when
        self._preview: np.ndarray | None = None
        self._words = ""
        self._previewer = functools.cache(_previewer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close()
        if self._status is None:
            return
        if error is None:
            self._status.state, self._status.message = "done", ""
        elif _is_cancel(error):
            self._status.state = "cancelled"  # a note stays: it may say why the run took so long
        else:
            self._status.state, self._status.message = "failed", brief(str(error))
        self._status.send(now=True)

    def on_estimate(self, latents: Tensor, family: Family) -> None:
        """Stores a preview of latents [B, 4, h, w] in the scale of the UNet of a family, which the next call shows."""
        if previewer := self._previewer(family):
            shown = [np.asarray(previewer.decode_latent_to_preview(one[None])) for one in latents[:PREVIEWED]]
            self._preview = np.concatenate(shown, axis=1)

    def __call__(self, done: int, total: int, phase: str = "", detail: str = "") -> None:
        """`detail` is a line of numbers."""
        if self._phase != (phase, total):
            self._begin(done, total, phase)
        self._terminal.set_postfix_str(detail, refresh=False)
        self._terminal.update(done - self._terminal.n)
        if self._node is None:
            return
        self._node.update_absolute(done, total, self._take_preview())
        if self._status:
            self._status.phase, self._status.done, self._status.total = phase, done, total
            left = self._time_left(done, total)
            self._status.detail = detail or ", ".join(filter(None, [self._words, left]))
            self._status.send()
        _raise_if_cancelled()

    def during(self, phase: str) -> Callable[[int, int], None]:
        """Reports the items of a phase as done, of all."""
        return functools.partial(self, phase=phase)

    def on_detail(self, words: str) -> None:
        """What the next call is about, such as an image and its step."""
        self._words = words

    def note(self, words: str) -> None:
        """Shows words on the node while it runs, and writes them into the log; none if empty."""
        if words:
            log.warning(words)
        if self._status:
            self._status.message = words

    def on_run(self, name: str) -> None:
        """The name of the folder of the training that begins."""
        if self._status:
            self._status.run = name

    def on_step(self, step: StepReport) -> None:
        """Shows a report of a training. The panel on the node draws its points and loads its samples."""
        if self._status and step.loss is not None:
            self._status.numbers = {name: getattr(step, name) for name in NUMBERS}
            point = (step.done, step.loss, step.smoothed, step.learning_rate, step.validation_loss)
            self._status.points.append(point)
        self(step.done, step.total, step.phase, step.detail)

    def close(self) -> None:
        if self._terminal:
            self._terminal.close()

    def _take_preview(self) -> tuple[str, Image.Image, int] | None:
        shown, self._preview = self._preview, None
        return None if shown is None else ("JPEG", Image.fromarray(shown), PREVIEW_SIDE)

    def _time_left(self, done: int, total: int) -> str:
        """Estimated from the last 20 items. The time before the first item, such as loading, is not counted."""
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
        self._node = _node_bar(total)


def _previewer(family: Family) -> LatentPreviewer | None:
    """Decodes previews of latents; None if previews are off in ComfyUI."""
    if not running():
        return None
    from comfy import latent_formats
    from latent_preview import get_previewer

    return get_previewer(device(), latent_formats.SDXL() if family.is_sdxl else latent_formats.SD15())


def _node_bar(total: int) -> ProgressBar | None:
    if not running():
        return None
    from comfy.utils import ProgressBar

    return ProgressBar(total)


def _raise_if_cancelled() -> None:
    from comfy.model_management import throw_exception_if_processing_interrupted

    throw_exception_if_processing_interrupted()


def _is_cancel(error: BaseException) -> bool:
    if not running():
        return False
    from comfy.model_management import InterruptProcessingException

    return isinstance(error, InterruptProcessingException)
