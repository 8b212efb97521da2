"""The outputs of a run: LoRA files with metadata, and sample images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..lora.files import write_lora
from ..lora.modules import LoRAFile
from ..sdxl.precision import DTYPES
from ..text.embedding_files import write_embedding
from .job import RunContext, TrainingJob
from .lora_metadata import lora_metadata
from .monitor.progress import OnStep
from .monitor.sample_images import SampleRenderer, Samples
from .run.runs import Run


@dataclass(frozen=True)
class RunOutputs:
    """Writes the files of `run`."""

    run: Run
    job: TrainingJob
    context: RunContext

    @property
    def renderer(self) -> SampleRenderer:
        cache, folder = self.context.folders.cache, self.run.folder / "samples"
        return SampleRenderer(self.job.base, self.job.config, self.job.resolution, cache, folder)

    def write_checkpoint_adapter(self, path: Path, trained: LoRAFile, steps: int) -> None:
        """Writes the LoRA of a checkpoint, in float32."""
        self._write(path, trained, steps, torch.float32)

    def write_step(self, trained: LoRAFile, step: int) -> None:
        """Writes the LoRA after a step, as it would be saved, beside the finished one."""
        self._write(self.run.lora_of_step(step), trained, step, self._dtype)

    def sample_images(self, trained: LoRAFile, step: int, on_step: OnStep) -> Samples:
        """Renders the sample prompts with the LoRA as it would be saved."""
        write: Callable[[Path], object] = lambda path: self._write(path, trained, step, self._dtype)  # noqa: E731
        return self.renderer.of_step(step, write, self.context.device, on_step)

    def write_result(self, trained: LoRAFile, steps: int) -> None:
        """Writes the finished LoRA, and each new token as a file of its own."""
        self._write(self.run.lora_path, trained, steps, self._dtype)
        for token, vectors in trained.tokens.items():
            write_embedding(self.run.embedding(token), vectors)

    @property
    def _dtype(self) -> torch.dtype:
        return DTYPES[self.job.config.save_dtype]

    def _write(self, path: Path, trained: LoRAFile, steps: int, dtype: torch.dtype) -> None:
        metadata = lora_metadata(self.job, self.run.name, steps, self.job.dtype(self.context.device))
        write_lora(path, replace(trained, metadata=metadata), dtype, self.job.config.save_format)
