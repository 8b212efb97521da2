"""Samples of a run: drawn as SDXLGenerateCached draws them, kept in the run's folder and scored."""

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

from ...evaluation.clip_score import score_images
from ...files import write_atomic, write_text_atomic
from ...generation.config import GenerateConfig
from ...generation.generate import generate
from ...lora.stack import LoRARef
from ...runtime.device import is_out_of_memory, release_memory
from ...runtime.loaded_parts import LoadedParts
from ...sdxl.base import SDXLBase
from ..config.train_config import TrainConfig
from .progress import OnStep, StepReport

log = logging.getLogger("sdxl_lora")

_COLUMNS = ("step", "image", "seed", "prompt", "clip_score")


class Samples(NamedTuple):
    """One picture (uint8 [H, W, 3]) and one CLIP score (0 to 100, None: unknown) for each sample prompt."""

    pixels: list[np.ndarray]
    clip_scores: tuple[float | None, ...]


@dataclass(frozen=True)
class Sampler:
    """Draws `sample_prompts` with the run's seed at `side` x `side` px. `cache` holds images/ and prompts/."""

    base: SDXLBase
    config: TrainConfig
    side: int
    cache: Path
    folder: Path

    def of_step(
        self, step: int, write_lora: Callable[[Path], object], device: torch.device, on_step: OnStep
    ) -> Samples:
        """With the LoRA file that `write_lora` writes; nothing stays loaded. What fails costs the samples, not the run.

        The pictures become `step-000100-00.png` and so on, their scores rows of `samples.csv`.
        """
        lora = self.folder / f".step-{step:06d}.safetensors"
        parts = LoadedParts(device, offload=True)
        try:
            write_lora(lora)
            pixels = self._draw(lora, parts, None, on_step)
            samples = Samples(pixels, self.scores(pixels, device))
            self._keep(f"step-{step:06d}-", pixels)
            self._keep_scores(step, samples)
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            log.warning("no samples at step %d: %s", step, error)
            return Samples([], ())
        finally:
            lora.unlink(missing_ok=True)
            parts.drop_all()
            release_memory(device)
        total = len(pixels) * self.config.sample_steps
        on_step(StepReport("drawing samples", total, total, preview=np.concatenate(pixels[:4], axis=1)))
        return samples

    def of_file(self, lora: Path, parts: LoadedParts, on_step: OnStep) -> Samples:
        """With a finished file, through the image cache. The pictures become `00.png` and so on."""
        pixels = self._draw(lora, parts, self.cache / "images", on_step)
        self._keep("", pixels)
        return Samples(pixels, self.scores(pixels, parts.device))

    def scores(self, pixels: Sequence[np.ndarray], device: torch.device) -> tuple[float | None, ...]:
        if not self.config.clip_model:
            return (None,) * len(pixels)
        report = score_images(pixels, self.config.sample_prompts, Path(self.config.clip_model), device)
        return tuple(score.clip_score if np.isfinite(score.clip_score) else None for score in report.scores)

    def _draw(self, lora: Path, parts: LoadedParts, image_cache: Path | None, on_step: OnStep) -> list[np.ndarray]:
        request = GenerateConfig(
            prompt="\n".join(self.config.sample_prompts),
            prompt_per_line=True,
            seed=self.config.seed,
            width=self.side,
            height=self.side,
            steps=self.config.sample_steps,
            guidance=self.config.sample_guidance,
            long_prompts="chunks" if self.config.caption_chunks > 1 else "cut",
        )
        images = generate(
            self.base,
            request,
            [LoRARef(lora, lora.stem, 1.0, 1.0)],
            parts=parts,
            cache_folder=image_cache,
            prompt_cache=self.cache,
            on_step=lambda done, total: on_step(StepReport("drawing samples", done, total)),
        )
        return [image.pixels for image in images]

    def _keep(self, prefix: str, pictures: Sequence[np.ndarray]) -> None:
        for number, pixels in enumerate(pictures):
            picture = Image.fromarray(pixels)
            path = self.folder / f"{prefix}{number:02d}.png"
            write_atomic(path, lambda file, picture=picture: picture.save(file, format="PNG"))

    def _keep_scores(self, step: int, samples: Samples) -> None:
        """After the rows of earlier steps. Those of later ones are from before a crash and will be made again."""
        file = self.folder / "samples.csv"
        rows = list(csv.reader(io.StringIO(file.read_text(encoding="utf-8"))))[1:] if file.exists() else []
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows(row for row in rows if int(row[0]) < step)
        for number, (prompt, score) in enumerate(zip(self.config.sample_prompts, samples.clip_scores, strict=True)):
            writer.writerow((step, f"step-{step:06d}-{number:02d}.png", self.config.seed, prompt, score))
        write_text_atomic(file, text.getvalue())
