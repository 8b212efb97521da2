"""Measures the bundled models.

    python tools/world/evaluate_world.py --work DIR [--assets assets] [--lora FILE --prefix TEXT]

Prints the VAE's PSNR, the tiny CLIP's retrieval, and how often a classifier trained apart, on drawings only, finds the
asked shape, colour and background in generated images. Writes DIR/grid.png: look at it.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionXLPipeline
from make_clip import make_drawings, retrieval
from make_vae import psnr
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy, interpolate
from transformers import CLIPModel, CLIPTokenizer

import world

NAMES = (world.SHAPES, tuple(world.COLOURS), tuple(world.BACKGROUNDS))
SIDE = 64


class Classifier(nn.Module):
    """[B,3,64,64] in -1..1 -> logits [B,3,10] for shape, colour and background."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 128)
        layers = [
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in zip(widths, widths[1:], strict=False)
        ]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 128), nn.ReLU(), nn.Linear(128, 30))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.features(images).view(-1, 3, 10)


def train_classifier(work: Path, steps: int = 1200, size: int = 64) -> Classifier:
    """On drawings of all three styles, shifted, noisy and softened now and then. Kept in DIR/classifier.pt."""
    model, saved = Classifier(), work / "classifier.pt"
    if saved.exists():
        model.load_state_dict(torch.load(saved, weights_only=True))
        return model.eval()
    torch.manual_seed(1)
    data, rng = make_drawings(6000), random.Random("classifier")
    labels = torch.tensor([[names.index(kind[i]) for i, names in enumerate(NAMES)] for kind in data["kinds"]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        picks = rng.sample(range(len(labels)), size)
        images = _disturbed(data["images"][picks].float() / 127.5 - 1, rng)
        loss = cross_entropy(model(images).flatten(0, 1), labels[picks].flatten())
        loss.backward()
        optimizer.step(), optimizer.zero_grad(), schedule.step()
    torch.save(model.state_dict(), saved)
    return model.eval()


def _disturbed(images: torch.Tensor, rng: random.Random) -> torch.Tensor:
    if rng.random() < 0.3:
        images = interpolate(interpolate(images, SIDE // 2, mode="area"), SIDE, mode="bilinear")
    images = torch.roll(images, (rng.randint(-3, 3), rng.randint(-3, 3)), dims=(2, 3))
    return images + rng.choice([0, 0.03, 0.06]) * torch.randn_like(images)


@torch.no_grad()
def found(classifier: Classifier, images: np.ndarray, kinds: list[tuple[str, str, str]]) -> torch.Tensor:
    """Which of shape, colour and background [B,3] the classifier finds in images [B,128,128,3], uint8."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    seen = classifier(interpolate(pixels, SIDE, mode="area")).argmax(-1)
    return seen == torch.tensor([[names.index(kind[i]) for i, names in enumerate(NAMES)] for kind in kinds])


def shares(right: torch.Tensor) -> dict[str, float]:
    each = dict(zip(("shape", "colour", "background"), right.float().mean(0).tolist(), strict=True))
    return {name: round(value, 3) for name, value in (each | {"all": right.all(1).float().mean().item()}).items()}


def drawn(style: str) -> tuple[np.ndarray, list[tuple[str, str, str]]]:
    kinds = world.held_out_kinds()
    return np.stack([np.asarray(world.draw(world.Scene(*kind, variant=3), style)) for kind in kinds]), kinds


def load_pipeline(folder: Path, lora: Path | None) -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, algorithm_type="dpmsolver++", solver_order=2, use_karras_sigmas=True
    )
    if lora:
        pipe.load_lora_weights(lora)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: StableDiffusionXLPipeline, prompts: list[str], guidance: float, seed: int = 0) -> np.ndarray:
    images = []
    for first in range(0, len(prompts), 20):
        part = prompts[first : first + 20]
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(part))]
        shown = pipe(part, num_inference_steps=25, guidance_scale=guidance, generator=generators, output_type="np")
        images.append((shown.images * 255).round().astype(np.uint8))
    return np.concatenate(images)


def grid(images: np.ndarray, columns: int = 10) -> Image.Image:
    rows = [np.concatenate(images[i : i + columns], axis=1) for i in range(0, len(images), columns)]
    return Image.fromarray(np.concatenate([row for row in rows if row.shape == rows[0].shape]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--assets", type=Path, default=Path(__file__).resolve().parents[2] / "assets")
    parser.add_argument("--count", type=int, default=200, help="prompts, over the 100 held-out kinds")
    parser.add_argument("--guidance", type=float, default=6.0)
    parser.add_argument("--lora", type=Path)
    parser.add_argument("--prefix", default="", help="'8-bit illustration of', say; empty: all phrasings in turn")
    args = parser.parse_args()
    classifier = train_classifier(args.work)
    for style in world.STYLES:
        print(f"classifier on {style} drawings: {shares(found(classifier, *drawn(style)))}", flush=True)
    vae = AutoencoderKL.from_pretrained(args.assets / "tiny-sdxl" / "vae")
    print("PSNR in dB:", {style: round(psnr(vae, style), 2) for style in world.STYLES}, flush=True)
    clip = args.assets / "tiny-clip"
    print(retrieval(CLIPModel.from_pretrained(clip).float(), CLIPTokenizer.from_pretrained(clip)), flush=True)
    kinds = [world.held_out_kinds()[i % 100] for i in range(args.count)]
    prompts = [prompt(kind, i, args.prefix) for i, kind in enumerate(kinds)]
    begun = time.time()
    images = generate(load_pipeline(args.assets / "tiny-sdxl", args.lora), prompts, args.guidance)
    print(f"{args.count} images in {time.time() - begun:.0f} s: {shares(found(classifier, images, kinds))}")
    grid(images[:100]).save(args.work / "grid.png")


def prompt(kind: tuple[str, str, str], number: int, prefix: str) -> str:
    scene = world.Scene(*kind)
    if prefix:
        return f"{prefix} {world.caption(scene)}"
    return world.caption(scene, phrase=number % len(world.PLAIN_PHRASES))


if __name__ == "__main__":
    main()
