"""The cache key of an image: everything that affects its pixels, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from types import MappingProxyType
from typing import Any

import torch

from ..cache.image_entries import SCHEMA
from ..control.control import Control, HintNumbers
from ..files import json_sha256
from ..lora.merge_into_weights import MERGE_VERSION
from ..sdxl.base import SDXLBase
from .config import GenerateConfig, attention_backend, is_own_size, micro_conditioning
from .guidance import guidance_settings, is_guided
from .prompt_reader import PARSER_VERSIONS, reading_facts
from .schedulers import scheduler_settings

KEYED_LIBRARIES = ("torch", "diffusers")


def image_settings(
    base: SDXLBase,
    config: GenerateConfig,
    loras: Sequence[Sequence[Any]],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    """The part of the key that all images of a request share, as JSON values. `loras` are StackEntry's identities.

    Names, paths, the host, the other images of the request and offloading are left out, as they affect no pixel.
    """
    guided = is_guided(config)
    return {
        "base": [list(pair) for pair in base.part_hashes],
        "loras": [[digest, float(unet), float(text), *blocks] for digest, unet, text, *blocks in loras],
        "negative_prompt": config.negative_prompt if guided else "",
        "guidance": float(config.guidance) if guided else 1.0,
        "steps": config.steps,
        "size": [config.width, config.height],
        "sampler": config.sampler,
        "schedule": scheduler_settings(base, config),
        "prompt_syntax": [config.prompt_syntax, PARSER_VERSIONS[config.prompt_syntax]],
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "attention": attention_backend(config),
        "attention_slicing": config.attention_slicing,
        "vae_tiling": config.tiles_vae,
        "vae_slicing": config.vae_slicing and config.batch_size > 1,
        "batch_size": config.batch_size,
        **({"merge": MERGE_VERSION} if loras else {}),
        "libraries": {name: ".".join(version(name).split(".")[:2]) for name in KEYED_LIBRARIES},
        **({"noise": "cpu"} if config.sampler == "dpmpp_sde" and device.type != "cpu" else {}),  # of the device before
        **reading_facts(config),
        **guidance_settings(base, config),
        **({} if is_own_size(config) else {"micro_conditioning": [list(pair) for pair in micro_conditioning(config)]}),
    }


def start_settings(config: GenerateConfig, start: Mapping[str, Any] | None) -> dict[str, Any]:
    """The part of the key for an image that starts from another one, whose content is `start`; else empty."""
    return {} if start is None else {"start": start, "denoise": float(config.denoise)}


def control_settings(config: GenerateConfig, controls: Sequence[Control], hints: HintNumbers) -> dict[str, Any]:
    """The part of the key for ControlNets, in their order; empty without any."""
    keys = [control.key(hint, config.width, config.height) for control, hint in zip(controls, hints, strict=True)]
    return {"controls": keys} if keys else {}


def image_facts(
    settings: dict[str, Any],
    prompt: str,
    seed: int,
    embeddings: Sequence[str] = (),
    inputs: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Everything that one image depends on.

    `embeddings` are the hashes of the files that its two prompts name, `inputs` its start_settings and
    control_settings.
    """
    used = {"embeddings": list(embeddings)} if embeddings else {}
    return {**settings, "prompt": prompt, "seed": seed, **used, **inputs}


def key_of(settings: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the settings as canonical JSON."""
    return json_sha256({"schema": SCHEMA, **settings})
