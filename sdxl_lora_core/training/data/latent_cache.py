"""Latents and masks of training images, computed once and cached on disk by content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ...cache.tensor_cache import Load, OnItem, is_readable, load_tensors, minor_version, store_tensors
from ...dataset.caption_dataset import CaptionEntry
from ...files import file_sha256, json_sha256
from ...images.crop import Crop
from ...images.decode import open_alpha, open_image, open_mask
from ...runtime.device import release_memory
from ...sdxl.base import SDXLBase, load_part
from ...sdxl.latents import crop_mask, crop_pixels, encode_posterior
from ...sdxl.micro_conditioning import time_ids


@dataclass(frozen=True)
class Sample:
    """A training image with one crop and orientation. Its tensors are read from disk when needed."""

    entry: CaptionEntry
    crop: Crop
    mirrored: bool
    latents_file: Path
    mask_file: Path | None

    def posterior(self, load: Load = load_tensors) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, float32 [4, H/8, W/8]."""
        tensors = load(self.latents_file)
        return tensors["mean"], tensors["std"]

    def mask(self, load: Load = load_tensors) -> Tensor:
        """The mask, float32 [1, H/8, W/8] from 0 to 1; ones if the image has no mask."""
        if self.mask_file is None:
            return torch.ones(1, self.crop.bucket_h // 8, self.crop.bucket_w // 8)
        return load(self.mask_file)["mask"]

    def time_ids(self) -> Tensor:
        return time_ids((self.entry.width, self.entry.height), self.crop, self.mirrored)


def make_sample(base: SDXLBase, entry: CaptionEntry, crop: Crop, mirrored: bool, folder: Path) -> Sample:
    """The sample with the paths of its tensors in `folder`, which may not exist yet."""
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
        latents_file=_latents_path(folder, key),
        mask_file=_latents_path(folder, json_sha256({**_mask_facts(entry), **cut})) if entry.mask else None,
    )


def cache_latents(
    base: SDXLBase, samples: Sequence[Sample], device: torch.device, hashes: Path, on_item: OnItem
) -> None:
    """Encodes the samples that are not on disk yet, in float32 because SDXL's VAE overflows in fp16.

    The VAE is released on return. `hashes` is the folder of known file hashes: an image is hashed again only if its
    size or modification time changed. Raises ValueError naming an image that changed since the dataset was loaded, or
    whose latents are not finite.
    """
    missing = [sample for sample in samples if not is_readable(sample.latents_file)]
    if not missing:
        return
    vae = load_part(base, "vae", torch.float32, device)
    for done, sample in enumerate(missing):
        on_item("encoding images", done, len(missing))
        _require_unchanged(sample.entry.image, sample.entry.sha256, hashes)
        store_tensors(sample.latents_file, _encode(vae, sample))
    del vae
    release_memory(device)


def cache_masks(samples: Sequence[Sample], hashes: Path, on_item: OnItem) -> None:
    """Crops the masks that are not on disk yet. Raises ValueError for one that changed since the dataset was loaded."""
    for done, sample in enumerate(samples):
        if sample.mask_file is not None and not is_readable(sample.mask_file):
            on_item("reading masks", done, len(samples))
            mask = crop_mask(_open_mask(sample.entry, hashes), sample.crop, sample.mirrored)
            store_tensors(sample.mask_file, {"mask": mask})


def _open_mask(entry: CaptionEntry, hashes: Path) -> Image.Image:
    assert entry.mask is not None
    _require_unchanged(entry.mask, _mask_sha256(entry), hashes)
    return open_alpha(entry.mask) if entry.mask == entry.image else open_mask(entry.mask)


def _mask_sha256(entry: CaptionEntry) -> str:
    """The hash of the mask file, or of the image if its alpha channel is the mask."""
    return entry.mask_sha256 or entry.sha256


def _mask_facts(entry: CaptionEntry) -> dict[str, str]:
    transparent = {"transparent": "black"} if entry.mask_has_alpha else {}
    return {"mask": _mask_sha256(entry), **transparent}


def _latents_path(folder: Path, key: str) -> Path:
    return folder / key[:2] / f"{key}.safetensors"


def _require_unchanged(path: Path, sha256: str, hashes: Path) -> None:
    if not path.exists():
        raise ValueError(f"{path.name} no longer exists: load the dataset again")
    if file_sha256(path, hashes) != sha256:
        raise ValueError(f"{path.name} changed after the dataset was loaded: load the dataset again")


def _encode(vae: object, sample: Sample) -> dict[str, Tensor]:
    path = sample.entry.image
    with torch.no_grad():
        mean, std = encode_posterior(vae, crop_pixels(open_image(path), sample.crop, sample.mirrored)[None])
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise ValueError(f"{path.name} has latents that are not finite: the base's VAE may be damaged")
    return {"mean": mean[0], "std": std[0]}
