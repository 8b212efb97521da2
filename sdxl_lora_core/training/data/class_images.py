"""Regularisation images that the base draws itself, where the data set has none.

What the class looks like before the training, so that it still looks so after it: Ruiz et al., DreamBooth
(arXiv 2208.12242), section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from PIL import Image

from ...dataset.caption_dataset import CaptionDataset, CaptionEntry
from ...files import file_sha256, write_atomic
from ...generation.config import GenerateConfig
from ...generation.generate import generate
from ...runtime.loaded_parts import LoadedParts
from ...sdxl.base import SDXLBase
from ..config.train_config import TrainConfig

FIRST_SEED = 0  # whatever the run's own seed, so that runs share what they draw


def planned_class_images(
    dataset: CaptionDataset, config: TrainConfig, folder: Path = Path()
) -> tuple[CaptionEntry, ...]:
    """The images that are to be drawn into `folder`, still without a hash. None if the data set has its own.

    They are repeated so that an epoch shows about as many of them as of the training images.
    """
    if not config.class_prompt or dataset.regularisation:
        return ()
    count = config.class_images or len(dataset.entries)
    repeats = max(1, round(sum(entry.repeats for entry in dataset.entries) / count))
    side = max(entry.resolution for entry in dataset.entries)
    return tuple(
        CaptionEntry(folder / f"{number:04d}.png", (config.class_prompt,), side, side, "", repeats, False, side)
        for number in range(count)
    )


def with_class_images(
    base: SDXLBase,
    dataset: CaptionDataset,
    config: TrainConfig,
    folder: Path,
    *,
    parts: LoadedParts,
    cache: Path,
    on_step: Callable[[int, int], None],
) -> CaptionDataset:
    """The data set with class images as its regularisation, drawn into `folder` through the image cache below `cache`.

    `parts` holds no weights on return. `on_step(done, total)` counts denoising steps and may raise to cancel; what is
    finished by then is in the cache.
    """
    planned = planned_class_images(dataset, config, folder)
    if not planned:
        return dataset
    request = GenerateConfig(
        prompt=config.class_prompt,
        seed=FIRST_SEED,
        count=len(planned),
        width=planned[0].width,
        height=planned[0].height,
    )
    drawn = generate(base, request, parts=parts, cache_folder=cache / "images", prompt_cache=cache, on_step=on_step)
    parts.drop_all()
    for entry, image in zip(planned, drawn, strict=True):
        write_atomic(entry.image, lambda file, pixels=image.pixels: Image.fromarray(pixels).save(file, format="PNG"))
    return replace(dataset, regularisation=tuple(replace(e, sha256=file_sha256(e.image)) for e in planned))
