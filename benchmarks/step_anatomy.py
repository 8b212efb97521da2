"""Operations and memory of a training step's forward and backward pass: full-size SDXL, 1024 x 1024, batch 1, rank 8.

    python -m benchmarks.step_anatomy           (operations of the frozen UNet, of peft's LoRA and of ours)
    python -m benchmarks.step_anatomy --peak    (bytes of a step of ours with AdamW by the memory plan, rank 16)

Nothing is computed. Operations are what reaches the kernels of meta tensors, where attention is taken apart into
products and softmax; views, whose result shares an input's memory without writing to it, and allocations are left out.
On a GPU each of the rest is a launch or more. The loss is the mean square of the prediction in float32: 9 operations.
The frozen UNet is counted with gradients of its sample, so that the backward pass goes through all of it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.train import ATTENTION
from sdxl_lora_core.sdxl.base import SDXLBase, empty_part
from sdxl_lora_core.sdxl.family import CONFIGS
from sdxl_lora_core.training.config.presets import PRESETS
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.data.batches import Batch
from sdxl_lora_core.training.job import TrainingJob
from sdxl_lora_core.training.model.adapters import Adapter
from sdxl_lora_core.training.model.flat_parameters import FlatParameters
from sdxl_lora_core.training.optim.memory_measure import MeasuredRun
from sdxl_lora_core.training.optim.memory_plan import plan_memory

SIDE = 128  # of the latents
DTYPE = torch.bfloat16
CONFIG = TrainConfig(rank=8, alpha=8.0)
BASE = SDXLBase(
    path=CONFIGS,
    layout="single_file",
    name="SDXL",
    precision="bf16",
    prediction_type="epsilon",
    zero_terminal_snr=False,
    fingerprint="",
    part_hashes=(),
    configs=CONFIGS,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", action="store_true", help="memory instead of operations")
    parser.add_argument("--most", type=int, default=25, help="how many kinds of operation to list")
    args = parser.parse_args()
    if args.peak:
        print_peaks()
    else:
        print_operations(args.most)


# Operations


class OperationCount(TorchDispatchMode):
    """Counts the operations that are dispatched inside the context, without views and allocations, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not launches_nothing(func):
            self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


def launches_nothing(operation: Any) -> bool:
    """Whether it is a view or allocates only. _unsafe_view is a view, although its schema does not say so."""
    name = operation._schema.name.removeprefix("aten::")
    returned = [value.alias_info for value in operation._schema.returns]
    is_view = name == "_unsafe_view" or any(info and not info.is_write for info in returned)
    return is_view or name.startswith(("empty", "new_empty"))


def print_operations(most: int) -> None:
    print("| UNet | forward | backward | both |\n|---|---|---|---|")
    counts = {name: operations(change) for name, change in VARIANTS.items()}
    for name, (forward, backward) in counts.items():
        print(f"| {name} | {forward.total():,} | {backward.total():,} | {(forward + backward).total():,} |")
    forward, backward = counts["ours"]
    print("\nThe most frequent operations of ours, beside those of the frozen UNet:\n")
    print(f"| operation | forward | backward | both | {FROZEN} |\n|---|---|---|---|---|")
    both, frozen = forward + backward, counts[FROZEN][0] + counts[FROZEN][1]
    for name, times in both.most_common(most):
        print(f"| {name} | {forward[name]:,} | {backward[name]:,} | {times:,} | {frozen[name]:,} |")


def operations(change: Callable[[Any], list[str]]) -> tuple[Counter[str], Counter[str]]:
    """Those of the forward pass and those of the backward pass, of a UNet after `change`."""
    with torch.device("meta"):
        unet: Any = empty_part(BASE, "unet", DTYPE).train()
        to_learn = change(unet)
        inputs = unet_inputs(unet)
        for name in to_learn:
            inputs[name].requires_grad_()
        with OperationCount() as forward:
            loss = loss_of(unet, inputs)
        with OperationCount() as backward:
            loss.backward()
    return forward.names, backward.names


def unet_inputs(unet: nn.Module) -> dict[str, Tensor]:
    settings: Any = unet.config
    pooled = settings.projection_class_embeddings_input_dim - 6 * settings.addition_time_embed_dim
    return {
        "sample": torch.empty(1, settings.in_channels, SIDE, SIDE, dtype=DTYPE),
        "timesteps": torch.empty(1, dtype=torch.long),
        "embeds": torch.empty(1, 77, settings.cross_attention_dim, dtype=DTYPE),
        "pooled": torch.empty(1, pooled, dtype=DTYPE),
        "time_ids": torch.empty(1, 6),
    }


def loss_of(unet: Any, inputs: dict[str, Tensor]) -> Tensor:
    added = {"text_embeds": inputs["pooled"], "time_ids": inputs["time_ids"]}
    prediction = unet(inputs["sample"], inputs["timesteps"], inputs["embeds"], added_cond_kwargs=added).sample
    return prediction.float().square().mean()


# What is done to the UNet before; each returns the names of the inputs that need gradients


def leave_frozen(unet: Any) -> list[str]:
    return ["sample"]


def add_by_peft(unet: Any) -> list[str]:
    """As in benchmarks.train: factors in float32, to which peft's layers convert their inputs."""
    from peft import LoraConfig

    unet.add_adapter(LoraConfig(r=CONFIG.rank, lora_alpha=CONFIG.rank, target_modules=ATTENTION))
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return []


def add_ours(unet: Any) -> list[str]:
    with_flat_parameters(unet)
    return []


def with_flat_parameters(unet: Any) -> FlatParameters:
    """As TrainableSDXL adds it: the fused layers write their gradients into flat buffers."""
    adapter = Adapter(unet, CONFIG)
    flat = FlatParameters(adapter.groups, adapter.scales, DTYPE)
    adapter.fuse(flat)
    return flat


FROZEN = "frozen"
VARIANTS = {FROZEN: leave_frozen, "peft": add_by_peft, "ours": add_ours}


# Memory


CARDS: dict[str, dict[str, Any]] = {
    "bf16, nothing saved": {"gradient_checkpointing": "off", "offload_blocks": 0},
    "8 GB preset": dict(PRESETS["low memory (8 GB)"]),
    "6 GB preset": dict(PRESETS["low memory (6 GB)"]),
    "everything offloaded": {"gradient_checkpointing": "on", "offload_blocks": 1000},
    "everything offloaded, int8": {"gradient_checkpointing": "on", "offload_blocks": 1000, "base_weights": "int8"},
}


def print_peaks() -> None:
    """What a step takes by the count, and the plan with its reserve: rank 16 on attention, batch 1."""
    print("| case | plan | counted peak GB | planned with reserve GB | seconds |")
    print("|---|---|---|---|---|")
    for name, settings in CARDS.items():
        started = time.perf_counter()
        config = TrainConfig(rank=16, alpha=16.0, precision="bf16", **settings)
        nothing: Any = None
        with tempfile.TemporaryDirectory() as folder:
            job = TrainingJob(BASE, nothing, config)
            measured = MeasuredRun(job, torch.device("cpu"), batch_of, Path(folder))
            plan = plan_memory(measured, config, config.memory_limit_gb * 1e9 or float("inf"))
            resting = measured.resting(plan.base_weights, plan.offloaded_blocks)
            peak = resting + measured.step(plan.checkpointing, plan.images_per_pass)
        chosen = f"{plan.checkpointing}, {plan.base_weights}, {plan.offloaded_blocks} blocks offloaded"
        seconds = time.perf_counter() - started
        print(f"| {name} | {chosen} | {peak / 1e9:.2f} | {plan.needed / 1e9:.2f} | {seconds:.0f} |", flush=True)


def batch_of(images: int) -> Batch:
    latents = torch.zeros(images, 4, SIDE, SIDE)
    return Batch(
        latents=latents,
        noise=latents,
        input_noise=latents,
        timesteps=torch.zeros(images, dtype=torch.long),
        captions=("",) * images,
        embeds=torch.zeros(images, 77, 2048, dtype=DTYPE),
        pooled=torch.zeros(images, 1280, dtype=DTYPE),
        time_ids=torch.zeros(images, 6),
        weights=torch.ones(images),
        masks=None,
    )


if __name__ == "__main__":
    main()
