"""Latents and masks of training images, computed once and kept on disk by content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ...cache.tensor_cache import OnItem, is_readable, minor_version, store_tensors
from ...dataset.caption_dataset import CaptionEntry
from ...files import file_sha256, json_sha256
from ...images.crop import Crop
from ...images.decode import open_alpha, open_image
from ...runtime.device import release_memory
from ...sdxl.base import SDXLBase, load_part
from ...sdxl.latents import crop_mask, crop_pixels, encode_posterior
from ...sdxl.micro_conditioning import time_ids


@dataclass(frozen=True)
class Sample:
    """One image in one cut and orientation, ready to train on. Its tensors stay on disk until they are read."""

    entry: CaptionEntry
    crop: Crop
    mirrored: bool
    latents_file: Path
    mask_file: Path | None

    def posterior(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, float32 [4, H/8, W/8]."""
        tensors = load_file(self.latents_file)
        return tensors["mean"], tensors["std"]

    def mask(self) -> Tensor:
        """What is learned of it, float32 [1, H/8, W/8] in 0..1: all of it if it has no mask."""
        if self.mask_file is None:
            return torch.ones(1, self.crop.bucket_h // 8, self.crop.bucket_w // 8)
        return load_file(self.mask_file)["mask"]

    def time_ids(self) -> Tensor:
        return time_ids((self.entry.width, self.entry.height), self.crop, self.mirrored)


def make_sample(base: SDXLBase, entry: CaptionEntry, crop: Crop, mirrored: bool, cache: Path) -> Sample:
    """Where the sample's tensors lie, or will lie."""
    cut = {
        "crop": [crop.resized_w, crop.resized_h, crop.left, crop.top, crop.bucket_w, crop.bucket_h],
        "mirrored": mirrored,
    }
    key = json_sha256(
        {
            "image": entry.sha256,
            **cut,
            "vae": dict(base.part_hashes)["vae"],
            "library": minor_version("diffusers"),
        }
    )
    return Sample(
        entry=entry,
        crop=crop,
        mirrored=mirrored,
        latents_file=_latents_path(cache, key),
        mask_file=_latents_path(cache, json_sha256({"mask": _mask_sha256(entry), **cut})) if entry.mask else None,
    )


def cache_latents(base: SDXLBase, samples: Sequence[Sample], device: torch.device, on_item: OnItem) -> None:
    """Encodes what is not on disk yet, in float32: SDXL's VAE overflows in fp16. The VAE is gone from memory on return.

    Raises ValueError with the file's name if an image changed since it was listed or its latents are not finite.
    """
    missing = [sample for sample in samples if not is_readable(sample.latents_file)]
    if not missing:
        return
    vae = load_part(base, "vae", torch.float32, device)
    for done, sample in enumerate(missing):
        on_item("encoding images", done, len(missing))
        store_tensors(sample.latents_file, _encode(vae, sample))
    del vae
    release_memory(device)


def cache_masks(samples: Sequence[Sample], on_item: OnItem) -> None:
    """Cuts the masks that are not on disk yet. Raises ValueError for one that changed since it was listed."""
    for done, sample in enumerate(samples):
        if sample.mask_file is not None and not is_readable(sample.mask_file):
            on_item("reading masks", done, len(samples))
            store_tensors(sample.mask_file, {"mask": crop_mask(_open_mask(sample.entry), sample.crop, sample.mirrored)})


def _open_mask(entry: CaptionEntry) -> Image.Image:
    assert entry.mask is not None
    _require_unchanged(entry.mask, _mask_sha256(entry))
    return open_alpha(entry.mask) if entry.mask == entry.image else open_image(entry.mask).convert("L")


def _mask_sha256(entry: CaptionEntry) -> str:
    """A file's own hash if it is a mask; the picture's if its alpha channel is."""
    return entry.mask_sha256 or entry.sha256


def _latents_path(cache: Path, key: str) -> Path:
    return cache / "latents" / "v1" / key[:2] / f"{key}.safetensors"


def _require_unchanged(path: Path, sha256: str) -> None:
    if not path.exists():
        raise ValueError(f"{path.name} is gone: load the dataset again")
    if file_sha256(path) != sha256:
        raise ValueError(f"{path.name} changed after the dataset was loaded: load the dataset again")


def _encode(vae: object, sample: Sample) -> dict[str, Tensor]:
    path = sample.entry.image
    _require_unchanged(path, sample.entry.sha256)
    with torch.no_grad():
        mean, std = encode_posterior(vae, crop_pixels(open_image(path), sample.crop, sample.mirrored)[None])
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise ValueError(f"{path.name} gives latents that are not finite: the base's VAE may be damaged")
    return {"mean": mean[0], "std": std[0]}
