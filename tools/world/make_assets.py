"""Assembles assets/ from the trained parts: python tools/world/make_assets.py --work DIR [--out assets]."""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path

import torch
from make_base import NOISE
from safetensors.torch import load_file, save_file

import world

SAMPLES = 24
MODEL_INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": "0.30.0",
    "force_zeros_for_empty_prompt": False,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SCHEDULER = NOISE | {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.30.0",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "interpolation_type": "linear",
    "use_karras_sigmas": False,
}


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")


def _older_name(name: str) -> str:
    """transformers from 5.6 on leaves out a text encoder's text_model, and reads both; before, it needs it."""
    return f"text_model.{name}" if name.startswith(("embeddings.", "encoder.layers.", "final_layer_norm.")) else name


def copy_part(source: Path, target: Path) -> None:
    """A model folder with its weights rounded to fp16 and its configuration free of machine paths."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.suffix == ".safetensors":
            weights = {_older_name(name): _half(value) for name, value in load_file(path).items()}
            save_file(weights, target / path.name, metadata={"format": "pt"})
        elif path.suffix == ".json":
            config = json.loads(path.read_text("utf-8"))
            config.pop("_name_or_path", None)
            if "dtype" in config:
                config["dtype"] = "float16"
            write_json(target / path.name, config)
        else:
            shutil.copyfile(path, target / path.name)


def _half(value: torch.Tensor) -> torch.Tensor:
    return value.half().contiguous() if value.is_floating_point() else value


def sample_kinds() -> list[tuple[str, str, str]]:
    """Training kinds in which every shape, colour and background occurs two or three times."""
    rng, allowed = random.Random("samples"), set(world.training_kinds())
    while True:
        columns = [_evenly(rng, names) for names in (world.SHAPES, tuple(world.COLOURS), tuple(world.BACKGROUNDS))]
        kinds = list(zip(*columns, strict=True))
        if len(set(kinds)) == SAMPLES and set(kinds) <= allowed:
            return kinds


def _evenly(rng: random.Random, names: tuple[str, ...]) -> list[str]:
    picked = [name for _ in range(SAMPLES // len(names)) for name in names]
    picked += rng.sample(names, SAMPLES - len(picked))
    return rng.sample(picked, SAMPLES)


def write_samples(folder: Path, style: str = "8-bit") -> None:
    for kind in ("images", "captions"):
        shutil.rmtree(folder / kind, ignore_errors=True)
        (folder / kind).mkdir(parents=True)
    for number, kind in enumerate(sample_kinds(), start=1):
        scene = world.Scene(*kind, variant=1000 + number)
        name = f"{number:02d}_{scene.colour}_{scene.shape}"
        world.draw(scene, style).save(folder / "images" / f"{name}.png", optimize=True)
        (folder / "captions" / f"{name}.txt").write_text(world.caption(scene, style) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[2] / "assets")
    args = parser.parse_args()
    sdxl = args.out / "tiny-sdxl"
    for part in ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        copy_part(args.work / part, sdxl / part)
    write_json(sdxl / "model_index.json", MODEL_INDEX)
    write_json(sdxl / "scheduler" / "scheduler_config.json", SCHEDULER)
    copy_part(args.work / "clip", args.out / "tiny-clip")
    write_samples(args.out / "sample-dataset")
    print(f"{sum(p.stat().st_size for p in args.out.rglob('*') if p.is_file()) / 1e6:.1f} MB in {args.out}")


if __name__ == "__main__":
    main()
