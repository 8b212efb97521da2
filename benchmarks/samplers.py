"""Every sampler with every schedule that it has against diffusers' own pipeline, and all of them to look at.

    python -m benchmarks.samplers [--sheet samplers.png]

tiny-sdxl, fp32 on the CPU, 128 x 128, 20 steps. Prints the largest difference of any pixel in 1/255.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from sdxl_lora_core.generation.config import GenerateConfig
from sdxl_lora_core.generation.generate import generate
from sdxl_lora_core.generation.job import GenerationContext, GenerationJob
from sdxl_lora_core.generation.samplers import SAMPLERS, SCHEDULES, SOLVERS, Sampler, Schedule
from sdxl_lora_core.runtime.loaded_parts import LoadedParts
from sdxl_lora_core.sdxl.base import open_base
from tests.generation.plain_diffusers import reference

TINY = Path(__file__).resolve().parents[1] / "assets/tiny-sdxl"
SIDE, LINE = 128, 14  # pixels
BASE = open_base(TINY, "fp32")
PARTS = LoadedParts(torch.device("cpu"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sheet", type=Path, help="write a sheet with a picture of each")
    sheet_path = parser.parse_args().sheet
    sheet = Image.new("RGB", (SIDE * len(SCHEDULES), (SIDE + LINE) * len(SAMPLERS)), "white")
    print("| sampler | " + " | ".join(SCHEDULES) + " |")
    print("|---" * (len(SCHEDULES) + 1) + "|")
    for row, sampler in enumerate(SAMPLERS):
        cells = []
        for column, schedule in enumerate(SCHEDULES):
            difference, pixels = compared(sampler, schedule)
            cells.append("" if difference is None else f"{difference:.2f}")
            if pixels is not None:
                place = column * SIDE, row * (SIDE + LINE)
                ImageDraw.Draw(sheet).text(place, f"{sampler} {schedule}", fill="black")
                sheet.paste(Image.fromarray(pixels), (place[0], place[1] + LINE))
        print(f"| {sampler} | " + " | ".join(cells) + " |", flush=True)
    if sheet_path:
        sheet.save(sheet_path)


def compared(sampler: Sampler, schedule: Schedule) -> tuple[float | None, np.ndarray | None]:
    if schedule not in SOLVERS[sampler].schedules:
        return None, None
    config = GenerateConfig(
        prompt="a red ring on a sky background",
        width=SIDE,
        height=SIDE,
        steps=20,
        guidance=4.0,
        seed=7,
        sampler=sampler,
        scheduler=schedule,
    )
    pixels = generate(GenerationJob(BASE, config), GenerationContext(PARTS))[0].pixels
    return float(abs(pixels - reference(TINY, config)).max()), pixels


if __name__ == "__main__":
    main()
