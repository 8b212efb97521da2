"""What the image cache costs an image that is not in it: 25 steps of the bundled tiny SDXL, with it against without.

    python -m benchmarks.cache_first_run

The two take turns, so that a busy machine slows both; the median of the pairs' ratios counts. The base is hashed once.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from sdxl_lora_core.cache.folders import CacheFolders
from sdxl_lora_core.generation.config import CacheMode, GenerateConfig
from sdxl_lora_core.generation.generate import generate
from sdxl_lora_core.generation.job import GenerationContext, GenerationJob
from sdxl_lora_core.runtime.loaded_parts import LoadedParts
from sdxl_lora_core.sdxl.base import open_base

TINY = Path(__file__).resolve().parent.parent / "assets/tiny-sdxl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=7)
    parser.add_argument("--side", type=int, default=128)
    args = parser.parse_args()
    begun = time.perf_counter()
    base = open_base(TINY, "fp32")
    print(f"opening and hashing the base, once: {(time.perf_counter() - begun) * 1e3:.0f} ms")
    parts = LoadedParts(torch.device("cpu"))

    def seconds(cache: CacheMode, seed: int, folder: Path) -> float:
        config = GenerateConfig(prompt="a red heart", width=args.side, height=args.side, seed=seed, cache=cache)
        begun = time.perf_counter()
        [image] = generate(GenerationJob(base, config), GenerationContext(parts, CacheFolders(folder), {"prompt": {}}))
        assert not image.hit
        return time.perf_counter() - begun

    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder)
        for mode in ("off", "use"):  # the first images load the weights and make the folders
            seconds(mode, 10**6, images)
        pairs = [(seconds("off", seed, images), seconds("use", seed, images)) for seed in range(args.images)]
    off, use = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratios = [with_cache / without for without, with_cache in pairs]
    print(f"an image, median of {args.images}: {off * 1e3:.0f} ms without the cache, {use * 1e3:.0f} ms with it")
    print(f"with / without: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
