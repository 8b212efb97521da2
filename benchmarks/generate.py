"""Seconds an image and peak memory of full-size SDXL: diffusers' pipeline as its tutorials use it, against ours.

    python -m benchmarks.generate --work DIR      (random weights in bf16, 7 GB in DIR, written by benchmarks.full_size)

Without LoRAs, and with two of rank 8 on attention: diffusers carries them as adapters, we merge them. 512 x 512 and 8
steps, on CUDA 1024 x 1024 and 25 steps, with guidance, the same noise for both. Both draw at once and take turns step
by step, so that a busy machine slows both; loading and merging are not counted. Peak memory is of each alone, in a
process of its own: the process's, on CUDA the GPU's.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.full_size import write_random_base
from sdxl_lora_core.generation.config import GenerateConfig
from sdxl_lora_core.generation.generate import generate
from sdxl_lora_core.generation.job import GenerationContext, GenerationJob
from sdxl_lora_core.lora.stack import LoRARef
from sdxl_lora_core.runtime.loaded_parts import LoadedParts
from sdxl_lora_core.sdxl.base import open_base

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
STRENGTHS = (0.8, 0.5)
PROMPT = "a lighthouse on a cliff at dusk, oil painting"
NEGATIVE = "blurry"
OnStep = Callable[[], object]
Draw = Callable[[int, OnStep], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = DEVICE.type == "cuda"
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--base", type=Path, help="another diffusers folder than DIR/random-sdxl")
    parser.add_argument("--size", type=int, default=1024 if on_gpu else 512)
    parser.add_argument("--steps", type=int, default=25 if on_gpu else 8)
    parser.add_argument("--images", type=int, default=3 if on_gpu else 1, help="images of each kind")
    parser.add_argument("--alone", choices=MAKERS, help="one of the two, for its memory")
    parser.add_argument("--loras", type=int, choices=(0, 2), default=0, help="with --alone")
    args = parser.parse_args()
    args.base = args.base or args.work / "random-sdxl"
    if not (args.base / "model_index.json").exists():
        write_random_base(args.base)
    files = [write_lora(args.work / f"random-{number}.safetensors", args.base, number) for number in range(2)]
    if args.alone:
        MAKERS[args.alone](args, files[: args.loras])(0, lambda: None)
        print(peak_gb())
        return
    # First of all: to the peak of a process counts what the one held that started it.
    memory = {count: {name: alone(args, name, count) for name in MAKERS} for count in (0, len(files))}
    for loras in ([], files):
        report(args, len(loras), take_turns(args, loras), memory[len(loras)])


# The two ways


def diffusers_way(args: argparse.Namespace, loras: Sequence[Path]) -> Draw:
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline

    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(
        args.base, torch_dtype=torch.bfloat16, add_watermarker=False
    ).to(DEVICE)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, use_karras_sigmas=True)
    pipeline.set_progress_bar_config(disable=True)
    for number, file in enumerate(loras):
        pipeline.load_lora_weights(str(file), adapter_name=f"lora{number}")
    if loras:
        pipeline.set_adapters([f"lora{number}" for number in range(len(loras))], list(STRENGTHS[: len(loras)]))

    def draw(seed: int, on_step: OnStep) -> np.ndarray:
        noise = torch.randn(1, 4, args.size // 8, args.size // 8, generator=torch.Generator().manual_seed(seed))

        def stepped(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step()
            return tensors

        [image] = pipeline(
            PROMPT,
            negative_prompt=NEGATIVE,
            width=args.size,
            height=args.size,
            num_inference_steps=args.steps,
            guidance_scale=7.0,
            latents=noise.to(DEVICE, torch.bfloat16),
            callback_on_step_end=stepped,
        ).images
        return np.asarray(image)

    return draw


def our_way(args: argparse.Namespace, loras: Sequence[Path]) -> Draw:
    base = open_base(args.base, "bf16", args.work / "hashes")
    stack = [LoRARef(file, file.stem, strength, strength) for file, strength in zip(loras, STRENGTHS, strict=False)]
    parts = LoadedParts(DEVICE)

    def draw(seed: int, on_step: OnStep, **changes: Any) -> np.ndarray:
        request: dict[str, Any] = {"width": args.size, "height": args.size, "steps": args.steps, **changes}
        config = GenerateConfig(prompt=PROMPT, negative_prompt=NEGATIVE, seed=seed, **request)
        context = GenerationContext(parts, on_step=lambda done, total: on_step() if done else None)
        [image] = generate(GenerationJob(base, config, stack), context)
        return image.pixels

    draw(0, lambda: None, width=64, height=64, steps=1)  # weights are loaded when they are first needed
    return draw


MAKERS: dict[str, Callable[[argparse.Namespace, Sequence[Path]], Draw]] = {"diffusers": diffusers_way, "ours": our_way}


def write_lora(path: Path, base: Path, seed: int) -> Path:
    """Random, of rank 8, on the UNet's attention."""
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel

    if not path.exists():
        with init_empty_weights():
            unet: Any = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(str(base), subfolder="unet"))
        draws = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, module in unet.named_modules():
            if name.endswith(ATTENTION):
                tensors[f"unet.{name}.lora_A.weight"] = torch.randn(8, module.in_features, generator=draws) * 0.02
                tensors[f"unet.{name}.lora_B.weight"] = torch.randn(module.out_features, 8, generator=draws) * 0.02
        save_file(tensors, path)
    return path


# Measuring


class Turns:
    """One of several threads works at a time, and hands on when it has done a step. Counts each one's own seconds."""

    def __init__(self, names: Sequence[str]) -> None:
        self.seconds = dict.fromkeys(names, 0.0)
        self._waiting = list(names)
        self._changed = threading.Condition()
        self._since = 0.0

    def begin(self, name: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting[0] == name)
        self._since = time.perf_counter()

    def hand_on(self, name: str, over: bool = False) -> None:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] += time.perf_counter() - self._since
        with self._changed:
            self._waiting.remove(name)
            if not over:
                self._waiting.append(name)
            self._changed.notify_all()
        if not over:
            self.begin(name)


def take_turns(args: argparse.Namespace, loras: Sequence[Path]) -> dict[str, list[float]]:
    """Seconds of each image. Prints how far apart the images are."""
    ways = {name: make(args, loras) for name, make in MAKERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for seed in range(args.images):
        turns = Turns(list(ways))
        images: dict[str, np.ndarray] = {}

        def work(name: str, seed: int = seed, turns: Turns = turns, images: dict[str, np.ndarray] = images) -> None:
            turns.begin(name)
            try:
                images[name] = ways[name](seed, lambda: turns.hand_on(name))
            finally:
                turns.hand_on(name, over=True)

        threads = [threading.Thread(target=work, args=(name,)) for name in ways]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for name in ways:
            seconds[name].append(turns.seconds[name])
        apart = np.abs(images["ours"].astype(int) - images["diffusers"])
        print(f"{len(loras)} LoRAs, seed {seed}: {rounded(turns.seconds)}; pixels differ by {apart.mean():.2f} of 255")
    return seconds


def alone(args: argparse.Namespace, name: str, loras: int) -> float:
    command = [sys.executable, "-m", "benchmarks.generate", "--work", str(args.work), "--base", str(args.base)]
    command += ["--size", str(args.size), "--steps", "1", "--alone", name, "--loras", str(loras)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def peak_gb() -> float:
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def report(args: argparse.Namespace, loras: int, seconds: dict[str, list[float]], memory: dict[str, float]) -> None:
    best = {name: min(times) for name, times in seconds.items()}
    print(f"{loras} LoRAs, {args.size} x {args.size}, {args.steps} steps on {DEVICE.type}, torch {torch.__version__}")
    print(f"  seconds an image: {rounded(best)}; ours / diffusers {best['ours'] / best['diffusers']:.3f}")
    print(f"  peak GB: {rounded(memory)}; ours / diffusers {memory['ours'] / memory['diffusers']:.3f}", flush=True)


def rounded(numbers: dict[str, float]) -> str:
    return ", ".join(f"{name} {number:.2f}" for name, number in numbers.items())


if __name__ == "__main__":
    main()
