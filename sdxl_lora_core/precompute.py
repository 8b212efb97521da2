"""Latents and prompt embeddings, computed once and kept on disk by content."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import base_model
from .base_model import SDXLBase
from .buckets import Crop, bucket_for, center_crop
from .dataset import CaptionEntry, open_image
from .files import file_sha256, json_sha256, write_atomic
from .latents import crop_pixels, encode_posterior, time_ids
from .prompts import encode_prompt_sdxl

log = logging.getLogger("sdxl_lora")
OnItem = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Sample:
    """One image in one orientation, ready to train on. The tensors stay on disk until `latents` or `prompt` is read."""

    entry: CaptionEntry
    crop: Crop
    mirrored: bool
    latents_file: Path
    prompt_file: Path

    def posterior(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, float32 [4, H/8, W/8]."""
        tensors = load_file(self.latents_file)
        return tensors["mean"], tensors["std"]

    def time_ids(self) -> Tensor:
        return time_ids((self.entry.width, self.entry.height), self.crop, self.mirrored)


def load_prompt(path: Path) -> tuple[Tensor, Tensor]:
    """Embeddings [77, C] and pooled embeddings [P] of one prompt."""
    tensors = load_file(path)
    return tensors["embeds"], tensors["pooled"]


def make_sample(
    base: SDXLBase, entry: CaptionEntry, mirrored: bool, cache: Path, dtype: torch.dtype, device: torch.device
) -> Sample:
    """Where the sample's tensors lie, or will lie."""
    crop = center_crop(entry.width, entry.height, bucket_for(entry.width, entry.height, entry.resolution))
    key = json_sha256(
        {
            "image": entry.sha256,
            "crop": [crop.resized_w, crop.resized_h, crop.left, crop.top, crop.bucket_w, crop.bucket_h],
            "mirrored": mirrored,
            "vae": dict(base.part_hashes)["vae"],
            "library": _minor_version("diffusers"),
        }
    )
    return Sample(
        entry=entry,
        crop=crop,
        mirrored=mirrored,
        latents_file=cache / "latents" / "v1" / key[:2] / f"{key}.safetensors",
        prompt_file=prompt_file(base, entry.caption, cache, dtype, device),
    )


def prompt_file(base: SDXLBase, prompt: str, cache: Path, dtype: torch.dtype, device: torch.device) -> Path:
    """Where a prompt's embeddings lie, or will lie. Kinds of device differ in the last bits, so each has its own."""
    hashes = dict(base.part_hashes)
    key = json_sha256(
        {
            "prompt": prompt,
            "encoders": [hashes[part] for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")],
            "dtype": str(dtype),
            "device": device.type,
            "library": _minor_version("transformers"),
        }
    )
    return cache / "prompts" / "v1" / key[:2] / f"{key}.safetensors"


def cache_prompts(
    base: SDXLBase, prompts: Iterable[str], cache: Path, device: torch.device, dtype: torch.dtype, on_item: OnItem
) -> None:
    """Encodes what is not on disk yet. The text encoders are gone from memory on return."""
    missing = {prompt: prompt_file(base, prompt, cache, dtype, device) for prompt in prompts}
    missing = {prompt: path for prompt, path in missing.items() if not _readable(path)}
    if not missing:
        return
    tokenizers = base_model.load_tokenizers(base)
    encoders = [base_model.load_part(base, part, dtype, device) for part in ("text_encoder", "text_encoder_2")]
    for done, (prompt, path) in enumerate(missing.items()):
        on_item("encoding captions", done, len(missing))
        with torch.no_grad():
            embeds, pooled = encode_prompt_sdxl([prompt], tokenizers, encoders)
        _store(path, {"embeds": embeds[0].cpu(), "pooled": pooled[0].cpu()})
    del encoders
    release_memory(device)


def cache_latents(base: SDXLBase, samples: Sequence[Sample], device: torch.device, on_item: OnItem) -> None:
    """Encodes what is not on disk yet, in float32: SDXL's VAE overflows in fp16. The VAE is gone from memory on return.

    Raises ValueError with the file's name if an image changed since it was listed or its latents are not finite.
    """
    missing = [sample for sample in samples if not _readable(sample.latents_file)]
    if not missing:
        return
    vae = base_model.load_part(base, "vae", torch.float32, device)
    for done, sample in enumerate(missing):
        on_item("encoding images", done, len(missing))
        _store(sample.latents_file, _encode(vae, sample))
    del vae
    release_memory(device)


def _encode(vae: object, sample: Sample) -> dict[str, Tensor]:
    path = sample.entry.image
    if file_sha256(path) != sample.entry.sha256:
        raise ValueError(f"{path.name} changed after the dataset was loaded: load the dataset again")
    with torch.no_grad():
        mean, std = encode_posterior(vae, crop_pixels(open_image(path), sample.crop, sample.mirrored)[None])
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise ValueError(f"{path.name} gives latents that are not finite: the base's VAE may be damaged")
    return {"mean": mean[0], "std": std[0]}


def release_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def _store(path: Path, tensors: dict[str, Tensor]) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomic(path, lambda temporary: save_file(contiguous, temporary))


def _readable(path: Path) -> bool:
    """Whether the cached file is there and whole; a damaged one is made again."""
    if not path.exists():
        return False
    try:
        load_file(path)
    except SafetensorError:
        log.warning("the cached file %s is damaged and will be made again", path.name)
        return False
    return True


def _minor_version(library: str) -> str:
    return ".".join(version(library).split(".")[:2])
