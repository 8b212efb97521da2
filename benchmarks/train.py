"""A training step of ours against the plain recipe of tutorials, on full-size SDXL with random weights.

    python -m benchmarks.train --work DIR      (needs DIR/random-sdxl, which benchmarks.full_size writes)

The plain recipe: every step encodes the image with the VAE in fp32 and the caption with both text encoders, the UNet
is in bf16 with peft's LoRA in fp32 under autocast, AdamW. Ours: what the training loop does, latents and prompts from
the cache. Steps take turns, so that a busy machine slows both. Peak memory is of each alone, in its own process.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch

from benchmarks.full_size import write_pictures, write_random_base
from sdxl_lora_core.cache.folders import CacheFolders
from sdxl_lora_core.dataset.caption_dataset import load_caption_dataset
from sdxl_lora_core.dataset.config import DatasetConfig
from sdxl_lora_core.sdxl.base import SDXLBase, load_part, load_tokenizers, open_base, scheduler_config
from sdxl_lora_core.text.encoding import encode_prompt_sdxl
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.data.batches import PassOfUpdate, TrainingData
from sdxl_lora_core.training.job import RunContext, TrainingJob
from sdxl_lora_core.training.loop import Loop
from sdxl_lora_core.training.run.runs import RunFolders

CPU = torch.device("cpu")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
Step = Callable[[], dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--alone", choices=("recipe", "ours"), help="one of the two, for its memory")
    args = parser.parse_args()
    if not (args.work / "random-sdxl" / "model_index.json").exists():
        write_random_base(args.work / "random-sdxl")
    if args.alone:
        step = {"recipe": recipe, "ours": ours}[args.alone](args.work, args.size)
        for _ in range(3):
            step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
        return
    memory = {name: peak_gb(args, name) for name in ("recipe", "ours")}  # before both are here at once
    report(take_turns(args.work, args.size, args.steps), memory)


def take_turns(work: Path, size: int, steps: int) -> dict[str, dict[str, float]]:
    """Median seconds of each part of a step, after one step of each that does not count."""
    both = {"recipe": recipe(work, size), "ours": ours(work, size)}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in both}
    for number in range(steps + 1):
        for name, step in both.items():
            parts = step()
            if number:
                taken[name].append(parts)
                print(name, json.dumps({part: round(seconds, 2) for part, seconds in parts.items()}), flush=True)
    return {
        name: {part: statistics.median(row[part] for row in rows) for part in rows[0]} for name, rows in taken.items()
    }


def peak_gb(args: argparse.Namespace, name: str) -> float:
    command = [sys.executable, "-m", "benchmarks.train", "--work", str(args.work), "--size", str(args.size)]
    done = subprocess.run([*command, "--alone", name], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def report(seconds: dict[str, dict[str, float]], memory: dict[str, float]) -> None:
    recipe_step, our_step = seconds["recipe"]["step"], seconds["ours"]["step"]
    loop = 1 - seconds["ours"]["unet"] / our_step
    print(f"recipe: {recipe_step:.2f} s a step, of which UNet {seconds['recipe']['unet']:.2f} s")
    print(f"ours:   {our_step:.2f} s a step, of which UNet {seconds['ours']['unet']:.2f} s")
    print(f"ours / recipe: {our_step / recipe_step:.3f}; our loop around the UNet: {loop:.1%} of its step")
    print(f"peak memory: recipe {memory['recipe']:.2f} GB, ours {memory['ours']:.2f} GB")
    print(f"ours / recipe: {memory['ours'] / memory['recipe']:.3f}")


def base_in(work: Path) -> SDXLBase:
    return open_base(work / "random-sdxl", "bf16", work / "hashes")


def recipe(work: Path, size: int) -> Step:
    from diffusers import DDPMScheduler
    from peft import LoraConfig
    from torch.nn.functional import mse_loss

    base = base_in(work)
    vae: Any = load_part(base, "vae", torch.float32)
    encoders = [load_part(base, part, torch.bfloat16) for part in ("text_encoder", "text_encoder_2")]
    tokenizers = load_tokenizers(base)
    unet: Any = load_part(base, "unet", torch.bfloat16)
    unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=ATTENTION))
    learned = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(learned, lr=1e-4)
    noise_schedule: Any = DDPMScheduler.from_config(scheduler_config(base))
    pixels = torch.zeros(1, 3, size, size)
    sizes = torch.tensor([[size, size, 0, 0, size, size]])

    def step() -> dict[str, float]:
        started = time.perf_counter()
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
            embeds, pooled = encode_prompt_sdxl(["a plain picture"], tokenizers, encoders)
        noise, timesteps = torch.randn_like(latents), torch.randint(1000, (1,))
        noisy = noise_schedule.add_noise(latents, noise, timesteps)
        at_unet = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            prediction = unet(
                noisy, timesteps, embeds, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}
            ).sample
        loss = mse_loss(prediction.float(), noise)
        loss.backward()
        after_unet = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        return {"step": time.perf_counter() - started, "unet": after_unet - at_unet}

    unet.train()
    return step


def ours(work: Path, size: int) -> Step:
    """The real loop, an update at a time, and then its UNet's forward and backward pass alone on the same batch."""
    base = base_in(work)
    pictures = write_pictures(work / f"pictures-{size}", size)
    dataset = load_caption_dataset(pictures, DatasetConfig(resolution=size))
    config = TrainConfig(rank=8, alpha=8.0, precision="bf16")
    cache = CacheFolders(work / "cache")
    data = TrainingData(TrainingJob(base, dataset, config), cache, CPU)
    data.cache(lambda phase, done, total: None)
    unused: Any = None
    context = RunContext(RunFolders(work, work, cache, lambda name: False), CPU)
    loop = Loop(data, context, MagicMock(**{"run.checkpoints.newest.return_value": None}), unused)
    batch = data.batch(PassOfUpdate(0, (0,)))

    def step() -> dict[str, float]:
        started = time.perf_counter()
        loop.update()
        updated = time.perf_counter()
        loop.model.predict(batch).sum().backward()
        alone = time.perf_counter()
        loop.gradients.clear()
        return {"step": updated - started, "unet": alone - updated}

    return step


if __name__ == "__main__":
    main()
