"""The sample images of a run: generated as SDXLGenerateCached does, stored in the run's folder and scored."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ...cache.folders import CacheFolders
from ...evaluation.clip_score import score_images
from ...files import write_atomic, write_text_atomic
from ...generation.config import GenerateConfig
from ...generation.generate import generate
from ...generation.job import GenerationContext, GenerationJob
from ...lora.stack import LoRARef
from ...runtime.device import is_out_of_memory, release_memory
from ...runtime.loaded_parts import LoadedParts
from ...sdxl.base import SDXLBase
from ..config.train_config import TrainConfig
from .progress import OnStep, StepReport

log = logging.getLogger("sdxl_lora")

_COLUMNS = ("step", "image", "seed", "prompt", "clip_score")


class Samples(NamedTuple):
    """An image (uint8 [H, W, 3]) and a CLIP score (0 to 100, None if unknown) for each sample prompt."""

    pixels: list[np.ndarray]
    clip_scores: tuple[float | None, ...]


@dataclass(frozen=True)
class SampleRenderer:
    """Generates `sample_prompts` with the run's seed at `side` x `side` pixels, into `folder`."""

    base: SDXLBase
    config: TrainConfig
    side: int
    cache: CacheFolders
    folder: Path

    def of_step(
        self, step: int, write_lora: Callable[[Path], object], device: torch.device, on_step: OnStep
    ) -> Samples:
        """Samples with the LoRA file that `write_lora` writes; nothing stays loaded. An error costs only the samples.

        The images are stored as `step-000100-00.png` and so on, their scores as rows of `samples.csv`.
        """
        lora = self.folder / f".step-{step:06d}.safetensors"
        parts = LoadedParts(device, offload=True)
        try:
            write_lora(lora)
            pixels = self._generate(lora, parts, on_step, cached=False)
            samples = Samples(pixels, self.scores(pixels, device))
            self._store(f"step-{step:06d}-", pixels)
            self._store_scores(step, samples)
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            log.warning("no samples at step %d: %s", step, error)
            return Samples([], ())
        finally:
            lora.unlink(missing_ok=True)
            parts.drop_all()
            release_memory(device)
        return samples

    def of_file(self, lora: Path, parts: LoadedParts, on_step: OnStep) -> Samples:
        """Samples with a finished file, through the image cache. The images are stored as `00.png` and so on."""
        pixels = self._generate(lora, parts, on_step, cached=True)
        self._store("", pixels)
        return Samples(pixels, self.scores(pixels, parts.device))

    def scores(self, pixels: Sequence[np.ndarray], device: torch.device) -> tuple[float | None, ...]:
        if not self.config.clip_model:
            return (None,) * len(pixels)
        report = score_images(pixels, self.config.sample_prompts, Path(self.config.clip_model), device)
        return tuple(score.clip_score if np.isfinite(score.clip_score) else None for score in report.scores)

    def _generate(self, lora: Path, parts: LoadedParts, on_step: OnStep, *, cached: bool) -> list[np.ndarray]:
        request = GenerateConfig(
            prompt="\n".join(self.config.sample_prompts),
            prompt_per_line=True,
            seed=self.config.seed,
            width=self.side,
            height=self.side,
            steps=self.config.sample_steps,
            guidance=self.config.sample_guidance,
            long_prompts="chunks" if self.config.caption_chunks > 1 else "cut",
            cache="use" if cached else "off",
        )
        job = GenerationJob(self.base, request, [LoRARef(lora, lora.stem, 1.0, 1.0)])
        context = GenerationContext(
            parts, self.cache, on_step=lambda done, total: on_step(StepReport("generating samples", done, total))
        )
        images = generate(job, context)
        return [image.pixels for image in images]

    def _store(self, prefix: str, images: Sequence[np.ndarray]) -> None:
        for number, pixels in enumerate(images):
            image = Image.fromarray(pixels)
            path = self.folder / f"{prefix}{number:02d}.png"
            write_atomic(path, lambda file, image=image: image.save(file, format="PNG"))

    def _store_scores(self, step: int, samples: Samples) -> None:
        """Adds rows after those of earlier steps. Rows of later steps are from before a crash and are dropped."""
        file = self.folder / "samples.csv"
        rows = list(csv.reader(io.StringIO(file.read_text(encoding="utf-8"))))[1:] if file.exists() else []
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows(row for row in rows if int(row[0]) < step)
        for number, (prompt, score) in enumerate(zip(self.config.sample_prompts, samples.clip_scores, strict=True)):
            writer.writerow((step, f"step-{step:06d}-{number:02d}.png", self.config.seed, prompt, score))
        write_text_atomic(file, text.getvalue())
