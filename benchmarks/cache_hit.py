"""How long SDXLGenerateCached takes when the images are there already, and what importing the pack costs.

    python -m benchmarks.cache_hit

The images are picture-like, 1024 x 1024, PNGs of at least 1.3 MB; the whole node call is timed in a warm process, for
one image and for 64 of them. Its CPU seconds say what a machine that is busy elsewhere does not.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("diffusers", "transformers", "peft", "accelerate", "pydantic")
IMPORT = (
    "import sys, time, importlib.util as u, torch, numpy, PIL.Image; t = time.perf_counter();"
    "s = u.spec_from_file_location('pack', '__init__.py', submodule_search_locations=['.']);"
    "sys.modules['pack'] = m = u.module_from_spec(s); s.loader.exec_module(m); seconds = time.perf_counter() - t;"
    f"print(round(seconds, 3), [name for name in {HEAVY} if name in sys.modules])"
)


def main() -> None:
    seconds = [
        subprocess.check_output([sys.executable, "-c", IMPORT], cwd=ROOT, text=True).split()[0] for _ in range(5)
    ]
    print(f"import of the pack beyond torch: {min(map(float, seconds))} s (best of 5: {', '.join(seconds)})")
    with tempfile.TemporaryDirectory() as home:
        os.environ["SDXL_LORA_HOME"] = home
        for count, repeats in ((1, 20), (64, 5)):
            wall, cpu, size = hits(Path(home), count, repeats)
            print(
                f"{count} hits, whole call, PNGs of {size / 1e6:.2f} MB: {milliseconds(wall)}; CPU {milliseconds(cpu)}"
            )
    print("heavy libraries loaded:", [name for name in HEAVY if name in sys.modules])


def hits(home: Path, count: int, repeats: int) -> tuple[list[float], list[float], int]:
    """Seconds of each call, by the clock and of the CPU, and the bytes of a PNG."""
    sys.path.insert(0, str(ROOT / "tools"))  # run_workflow is a script, not a package
    from run_workflow import load_pack

    nodes = load_pack().NODE_CLASS_MAPPINGS
    (base, _) = nodes["LoadSDXLBase"]().load(base="tiny-sdxl (bundled)", precision="fp32")["result"]
    request: dict[str, Any] = {
        "prompt": "a red heart on a sky background",
        "negative_prompt": "",
        "seed": 1,
        "steps": 25,
        "guidance": 7.0,
        "width": 1024,
        "height": 1024,
        "count": count,
        "sampler": "dpmpp_2m",
        "scheduler": "karras",
        "cache": "only",
    }
    size = fill_cache(home, base, request)
    node, wall, cpu = nodes["SDXLGenerateCached"](), [], []
    for _ in range(repeats + 1):
        begun, used = time.perf_counter(), time.process_time()
        node.generate(base=base, graph={"1": {}}, extra_pnginfo={"workflow": {}}, **request)
        wall.append(time.perf_counter() - begun)
        cpu.append(time.process_time() - used)
    return wall[1:], cpu[1:], size  # the first one writes the previews


def fill_cache(home: Path, base: Any, request: dict[str, Any]) -> int:
    """Puts images under the request's keys, as a run of SDXL would have left them. Returns the bytes of a PNG."""
    from sdxl_lora_nodes_pack.sdxl_lora_core.cache import image_cache  # type: ignore[import-not-found]
    from sdxl_lora_nodes_pack.sdxl_lora_core.generation import image_keys  # type: ignore[import-not-found]
    from sdxl_lora_nodes_pack.sdxl_lora_core.generation.config import GenerateConfig  # type: ignore[import-not-found]

    config = GenerateConfig(**request)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = image_keys.image_settings(base, config, [], torch.float32, device)
    cache = image_cache.ImageCache(home / "user/sdxl_lora/images")
    for seed in range(request["seed"], request["seed"] + request["count"]):
        cache.store(image_keys.image_key(settings, request["prompt"], seed), picture(seed), {"settings": settings})
    return next(cache.root.glob("v1/*/*/image.png")).stat().st_size


def milliseconds(times: list[float]) -> str:
    return f"median {statistics.median(times) * 1e3:.1f} ms, worst {max(times) * 1e3:.1f} ms"


def picture(seed: int) -> np.ndarray:
    """Soft forms with grain, 1024 x 1024, as a photograph compresses."""
    noise = np.random.default_rng(seed)
    soft = Image.fromarray(noise.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize(
        (1024, 1024), Image.Resampling.BICUBIC
    )
    grain = noise.normal(0, 3, (1024, 1024, 3))
    return (np.asarray(soft) + grain).clip(0, 255).astype(np.uint8)


if __name__ == "__main__":
    main()
