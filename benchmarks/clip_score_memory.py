"""Memory of CLIP Score above its input and outputs: 1,000 images of 512 x 512 with the bundled CLIP.

    python -m benchmarks.clip_score_memory

Prints one line of JSON: megabytes of input, of outputs, and of the peak above both, and the seconds. Needs about 12 GB.
"""

from __future__ import annotations

import json
import os
import resource
import tempfile
import time
from typing import Any

import torch

from tools.run_workflow import load_pack

IMAGES, SIDE = 1000, 512
MEGABYTE = 1e6


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        os.environ["SDXL_LORA_HOME"] = home
        node: Any = load_pack().NODE_CLASS_MAPPINGS["CLIPScore"]()
        inputs = {"prompt": "a red circle", "clip_model": "tiny-clip (bundled)"}
        node.score(images=torch.rand(2, SIDE, SIDE, 3), **inputs)  # imports and the model
        images = torch.rand(IMAGES, SIDE, SIDE, 3)
        before, start = peak(), time.perf_counter()
        ordered, best, _, _, annotated, _ = node.score(images=images, **inputs)["result"]
        outputs = sum(tensor.nbytes for tensor in (ordered, best, annotated))
        above = (peak() - before) - outputs
        figures = {
            "input_mb": images.nbytes,
            "outputs_mb": outputs,
            "peak_above_mb": above,
        }
        rounded = {name: round(value / MEGABYTE) for name, value in figures.items()}
        print(json.dumps(rounded | {"seconds": round(time.perf_counter() - start, 1)}))


def peak() -> int:
    """The largest resident size so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
