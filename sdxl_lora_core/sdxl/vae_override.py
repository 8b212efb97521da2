"""Replaces the VAE of a base by another one: a single file or a diffusers folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..files import json_sha256
from ..safetensors_file import WeightsHeader, read_header
from .base import SDXLBase, weights_sha256
from .detection import PART_CLASSES, read_json
from .file_kinds import VAE, kind_of
from .loading import weight_files

_LIKE = {"latent_channels": 4, "scaling_factor": 0.18215}  # with diffusers' defaults, for settings that are not stored
_WIDTHS = {"encoder.conv_in": 0, "decoder.conv_in": -1}  # convolution: the index of its width in block_out_channels


def with_vae(base: SDXLBase, path: Path, hash_memo: Path | None = None) -> SDXLBase:
    """The base with the VAE at `path`, for training and generation. Reads settings and headers, and hashes the file.

    A single file of Stable Diffusion 1.5's VAE has the same tensors as SDXL's and is not detected; a folder is.
    Raises FileNotFoundError if `path` does not exist, ValueError if it is not a VAE of the base's shape.
    """
    wanted = f"use a VAE made for {base.family.title}: a .safetensors file, or a diffusers folder with config.json"
    if not path.exists():
        raise FileNotFoundError(f"VAE {path.name} does not exist: {wanted}")
    config = read_json(base.configs / "vae" / "config.json")
    if path.is_dir():
        own = read_json(path / "config.json")
        _require_like(path.name, own, config, wanted)
        config = own
    _require_shapes(path.name, [read_header(file) for file in weight_files(path)], config, wanted)
    digest = weights_sha256(path, "vae", hash_memo)
    return replace(
        base,
        vae=path,
        part_hashes=tuple(sorted({**dict(base.part_hashes), "vae": digest}.items())),
        fingerprint=json_sha256([base.fingerprint, digest]),
    )


def _require_like(name: str, config: dict[str, Any], bases: dict[str, Any], wanted: str) -> None:
    kind = config.get("_class_name")
    if kind != PART_CLASSES["vae"]:
        raise ValueError(f"folder {name} is a {kind} and not an {PART_CLASSES['vae']}: {wanted}")
    if config.get("latents_mean") is not None:
        raise ValueError(f"folder {name} has latents_mean, as the VAE of Playground v2.5: {wanted}")
    for setting, default in _LIKE.items():
        own, needed = config.get(setting, default), bases.get(setting, default)
        if own != needed:
            raise ValueError(
                f"folder {name} has {setting} {own} where the base's VAE has {needed}, so it belongs to another kind "
                f"of model: {wanted}"
            )


def _require_shapes(name: str, headers: Sequence[WeightsHeader], config: dict[str, Any], wanted: str) -> None:
    shapes = {key.removeprefix(VAE): shape for header in headers for key, shape in header.shapes.items()}
    for module, which in _WIDTHS.items():
        found = shapes.get(f"{module}.weight", ())
        if len(found) != 4:
            kind = kind_of(headers[0])
            raise ValueError(f"{name} is {kind} without {module}.weight of a VAE for images: {wanted}")
        widths = (
            config["block_out_channels"][which],
            config.get("latent_channels", _LIKE["latent_channels"]) if which else config["in_channels"],
        )
        if found[:2] != widths:
            raise ValueError(
                f"{name} has a {module} from {found[1]} to {found[0]} channels where the base's VAE goes from "
                f"{widths[1]} to {widths[0]}, so it belongs to another kind of model: {wanted}"
            )
