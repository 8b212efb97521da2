"""Training runs, data sets and images whose fingerprints and keys version 0.3.0 has written down.

The stored values in tests/guards were written by the code of 0.3.0 (commit 634e8f8): this file, as it was when they
were committed, run by its path from a checkout of that commit:

    PYTHONPATH=. python /path/to/tests/guards/cases.py /path/to/tests/guards
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from sdxl_lora_core.cache.folders import CacheFolders
from sdxl_lora_core.cache.image_cache import ImageCache
from sdxl_lora_core.control.config import ControlConfig
from sdxl_lora_core.control.control import Control
from sdxl_lora_core.control.control_net import ControlNet
from sdxl_lora_core.dataset.caption_dataset import CaptionDataset, load_caption_dataset, with_validation
from sdxl_lora_core.dataset.config import DatasetConfig
from sdxl_lora_core.generation.config import GenerateConfig
from sdxl_lora_core.generation.generate import generate
from sdxl_lora_core.generation.init_images import start_images
from sdxl_lora_core.generation.job import GenerationContext, GenerationJob
from sdxl_lora_core.lora.stack import LoRARef
from sdxl_lora_core.runtime.loaded_parts import LoadedParts
from sdxl_lora_core.sdxl.base import SDXLBase, open_base
from sdxl_lora_core.sdxl.vae_override import with_vae
from sdxl_lora_core.training.config.presets import PRESETS, with_preset
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.run.runs import run_fingerprint
from sdxl_lora_core.training.train import as_trained

ROOT = Path(__file__).resolve().parents[2]
GUARDS = ROOT / "tests/guards"
PICTURES, SAMPLE, LORAS = GUARDS / "pictures", ROOT / "assets/sample-dataset", ROOT / "assets/loras"
TINY_SDXL, TINY_CLIP = ROOT / "assets/tiny-sdxl", ROOT / "assets/tiny-clip"
CPU = torch.device("cpu")
VERSIONS = {"torch": "2.13.0", "diffusers": "0.42.1", "transformers": "5.23.0"}  # with which the values were made


@contextmanager
def libraries_of_0_3_0() -> Iterator[None]:
    """Keys hold the versions of libraries, as importlib.metadata.version tells them. It asks `distribution`, which is
    replaced here, so that modules that have imported `version` by name get the stored versions, too.
    """
    real = metadata.distribution

    def distribution(name: str) -> Any:
        return SimpleNamespace(version=VERSIONS[name]) if name in VERSIONS else real(name)

    with mock.patch.object(metadata, "distribution", distribution):
        yield


# Data sets

DATASETS: dict[str, list[tuple[Path, dict[str, Any]]]] = {
    "sample": [(SAMPLE, {})],
    "lower resolution": [(SAMPLE, {"resolution": 128})],
    "trigger word": [(SAMPLE, {"trigger_word": "ohwx"})],
    "validation": [(SAMPLE, {"validation_percent": 20})],
    "repeats and flip": [(SAMPLE, {"repeats": 3, "flip": True})],
    "random crops": [(SAMPLE, {"random_crops": 4})],
    "masks": [(PICTURES, {"resolution": 64})],
    "a caption per line": [(PICTURES, {"resolution": 64, "caption_per_line": True})],
    "regularisation": [(PICTURES, {}), (SAMPLE, {"is_regularisation": True})],
    "chained": [(SAMPLE, {"trigger_word": "ohwx"}), (PICTURES, {"trigger_word": "sks", "repeats": 2})],
}


@functools.cache
def dataset(name: str) -> CaptionDataset:
    loaded: CaptionDataset | None = None
    for folder, settings in DATASETS[name]:
        loaded = load_caption_dataset(folder, DatasetConfig(**settings), loaded)
    assert loaded
    return loaded


# Training runs: the data set and the settings of each

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("sample", {}),
    "early stopping": ("validation", {"validate_every": 20, "early_stopping": 3}),
    "best validation loss": ("validation", {"validate_every": 20, "keep_best": "validation_loss"}),
    "best CLIP score": (
        "sample",
        {
            "keep_best": "clip_score",
            "sample_every": 20,
            "sample_prompts": ("a red star",),
            "clip_model": str(TINY_CLIP),
        },
    ),
    "continued": ("sample", {"continue_from": str(LORAS / "8bit_style.safetensors")}),
    "text encoders": ("sample", {"text_encoder_learning_rate": 5e-5, "text_encoder_2_learning_rate": 2e-5}),
    "new tokens": ("trigger word", {"new_tokens": "ohwx=cat", "vectors_per_token": 2, "train_unet": False}),
    "v-prediction": ("sample", {"prediction": "v_prediction", "zero_terminal_snr": "on"}),
    "another adapter": ("sample", {"adapter": "lokr", "rank_dropout": 0.1, "blocks": "mid_block"}),
    "another loss": ("sample", {"loss": "huber", "huber_delta": 0.2, "timestep_sampling": "logit_normal"}),
    "another optimizer": ("sample", {"optimizer": "lion", "lr_schedule": "polynomial", "ema_decay": 0.99, "seed": 7}),
    "captions": ("sample", {"shuffle_tags": True, "keep_tags": 1, "caption_chunks": 2}),
    "masked loss": ("masks", {"masked_loss": True}),
    "class images": ("sample", {"class_prompt": "a circle", "class_images": 4, "prior_weight": 0.5}),
    **{f"data set: {name}": (name, {}) for name in DATASETS},
    **{f"preset: {preset}": ("sample", with_preset({}, preset)[0]) for preset in PRESETS if "memory" not in preset},
    # Since then this preset asks for the plan that fits.
    "preset: low memory (8 GB)": ("sample", {"gradient_accumulation": 4, "gradient_checkpointing": "on"}),
}


def base(**said: Any) -> SDXLBase:
    return open_base(TINY_SDXL, "fp32", **said)


def fingerprint(base: SDXLBase, dataset: CaptionDataset, config: TrainConfig) -> str:
    """As 0.3.0 took it, by which its finished runs are still found."""
    return run_fingerprint(as_trained(base, config), dataset, config, version=1)


def run_fingerprints() -> dict[str, str]:
    own, pictures = base(), dataset("masks")
    found = {name: fingerprint(own, dataset(of), TrainConfig(**settings)) for name, (of, settings) in RUNS.items()}
    watched = TrainConfig(validate_every=20, keep_best="validation_loss")
    another_vae = with_vae(own, TINY_SDXL / "vae")
    return {
        **found,
        "a data set to validate with": fingerprint(own, with_validation(dataset("sample"), pictures), watched),
        "a v-prediction base": fingerprint(base(prediction="v_prediction"), pictures, TrainConfig()),
        "another VAE": fingerprint(another_vae, pictures, TrainConfig()),
    }


def dataset_fingerprints() -> dict[str, str]:
    return {name: dataset(name).fingerprint for name in DATASETS}


# Images

IMAGES: dict[str, dict[str, Any]] = {
    "default": {},
    "negative prompt": {"negative_prompt": "blurry"},
    "guidance off": {"negative_prompt": "blurry", "guidance": 1.0},
    "guidance in part": {"guidance_rescale": 0.5, "guidance_start": 0.1, "guidance_end": 0.9},
    "other steps": {"steps": 7, "width": 512, "height": 768, "seed": 3},
    "euler": {"sampler": "euler", "scheduler": "normal"},
    "ancestral": {"sampler": "euler_ancestral", "scheduler": "sgm_uniform"},
    "ddim": {"sampler": "ddim", "scheduler": "ddim_uniform"},
    "exponential": {"sampler": "dpmpp_2m_sde", "scheduler": "exponential"},
    "comfy syntax": {"prompt_syntax": "comfy", "prompt": "a (red:1.2) circle, embedding:word"},
    "long prompts": {"long_prompts": "chunks"},
    "micro-conditioning": {"original_width": 512, "original_height": 512, "crop_left": 64, "target_height": 768},
    "batches": {"batch_size": 2, "vae_slicing": True},
    "tiles": {"vae_tiling": True},
    "tiles from a size on": {"width": 2048},
    "exact attention": {"attention": "math"},
    "attention in slices": {"attention_slicing": True},
    "second pass": {"hires_scale": 1.5, "hires_denoise": 0.4, "hires_steps": 9},
}
SIDE = 64
SMALL = {"width": SIDE, "height": SIDE}


def wanted(**changes: Any) -> GenerateConfig:
    return GenerateConfig(**{"prompt": "a red circle", "count": 2, **changes})


def picture(value: int) -> np.ndarray:
    """Of the image's own size, so that no scaling enters the keys."""
    return np.full((SIDE, SIDE, 3), value, np.uint8)


def half_mask() -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), np.float32)
    mask[:, : SIDE // 2] = 1
    return mask


def loras() -> list[LoRARef]:
    """A whole one, and one with strengths by block."""
    return [
        LoRARef(LORAS / "8bit_style.safetensors", "8bit_style", 1.0, 0.5),
        LoRARef(LORAS / "line_style.safetensors", "line_style", 0.8, 0.8, "mid_block=0, up_blocks.0=0.5"),
    ]


def controls() -> list[Control]:
    """Handles as they are after opening: a key needs no weights."""
    plain = ControlNet(Path("edges"), "edges", "a" * 64, {}, 0)
    union = ControlNet(Path("union"), "union", "b" * 64, {}, 8)
    later = ControlConfig(strength=0.5, start_percent=0.1, end_percent=0.8, control_type="depth")
    return [Control(plain, (picture(50),), ControlConfig()), Control(union, (picture(90),), later)]


def requests_with_more() -> dict[str, tuple[GenerateConfig, dict[str, Any]]]:
    """Those that take more than settings."""
    part, whole = wanted(**SMALL, denoise=0.6), wanted(**SMALL)
    latents = torch.arange(256, dtype=torch.float32).reshape(1, 4, SIDE // 8, SIDE // 8)
    second = wanted(**SMALL, denoise=0.6, hires_scale=2.0)
    masked = start_images(part, [picture(200)], masks=[half_mask()])
    return {
        "LoRAs": (wanted(), {"loras": loras()}),
        "image to image": (part, {"starts": start_images(part, [picture(200)])}),
        "inpainting": (part, {"starts": masked}),
        "from latents": (part, {"starts": start_images(part, latents=latents)}),
        "ControlNets": (whole, {"controls": controls()}),
        "second pass with everything": (second, {"starts": masked, "controls": controls(), "loras": loras()}),
    }


def keys_of(base: SDXLBase, config: GenerateConfig, **more: Any) -> list[str]:
    """The keys under which `generate` looks for the images. Nothing is drawn: each look finds something."""
    found = mock.patch.object(ImageCache, "load", lambda self, key: picture(0))
    with found, libraries_of_0_3_0(), TemporaryDirectory() as folder:
        unused = CacheFolders(Path(folder))
        context = GenerationContext(
            LoadedParts(CPU), unused, find_embedding=lambda name: GUARDS / f"{name}.safetensors"
        )
        images = generate(GenerationJob(base, config, **more), context)
    return [image.key for image in images]


def image_keys() -> dict[str, list[str]]:
    plain = {name: (wanted(**changes), {}) for name, changes in IMAGES.items()}
    own, rescaled = base(), base(prediction="v_prediction", zero_terminal_snr="on")
    return {
        **{name: keys_of(own, config, **more) for name, (config, more) in (plain | requests_with_more()).items()},
        "a v-prediction base": keys_of(rescaled, wanted()),
    }


def write_json(path: Path, values: Mapping[str, str | Sequence[str]]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def main(folder: Path) -> None:
    write_json(folder / "run_fingerprints.json", run_fingerprints())
    write_json(folder / "dataset_fingerprints.json", dataset_fingerprints())
    write_json(folder / "image_keys.json", image_keys())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
