"""The families of base models: SDXL, and Stable Diffusion 1.5, which images are generated with only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from .file_kinds import TEXT, TEXT_1, TEXT_2, UNET, VAE

Part = Literal["unet", "vae", "text_encoder", "text_encoder_2"]
PARTS: tuple[Part, ...] = get_args(Part)
ENCODERS: tuple[Part, Part] = ("text_encoder", "text_encoder_2")
CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Family:
    """A family of base models, by its `name`.

    `title` and `wanted` are for messages; `checkpoint` is its kind as kind_of names it. `pipelines` is a pattern of
    diffusers' pipelines with its parts, of which `pipeline` is the plain one. `text` is the prefix of the first text
    encoder's tensors in a single file, `configs` the settings of single files. `last_layer`: prompts are embedded by
    the last layer of the text encoder and its final norm, instead of by the penultimate layer.
    """

    name: Literal["sdxl", "sd15"]
    title: str
    wanted: str
    checkpoint: str
    pipeline: str
    pipelines: str
    parts: tuple[Part, ...]
    tokenizers: tuple[str, ...]
    text: str
    configs: Path
    last_layer: bool = False

    @property
    def is_sdxl(self) -> bool:
        return self.name == "sdxl"

    @property
    def encoders(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part in ENCODERS)

    def prefix(self, part: Part) -> str:
        """The prefix of a part's tensors in single files."""
        return {"unet": UNET, "vae": VAE, "text_encoder": self.text, "text_encoder_2": TEXT_2}[part]

    def has_pipeline(self, name: str) -> bool:
        return re.fullmatch(self.pipelines, name) is not None


_FORMS = "a single-file checkpoint (.safetensors) or a diffusers folder with model_index.json"
SDXL = Family(
    name="sdxl",
    title="SDXL",
    wanted=f"use an SDXL base: {_FORMS}",
    checkpoint="an SDXL checkpoint",
    pipeline="StableDiffusionXLPipeline",
    pipelines=r"StableDiffusionXL\w*Pipeline",  # plain, Img2Img, ControlNet, PAG and others
    parts=PARTS,
    tokenizers=("tokenizer", "tokenizer_2"),
    text=TEXT,
    configs=CONFIGS,
)
# Rombach et al., arXiv 2112.10752.
SD15 = Family(
    name="sd15",
    title="Stable Diffusion 1.5",
    wanted=f"use a Stable Diffusion 1.5 base: {_FORMS}",
    checkpoint="a Stable Diffusion 1.x checkpoint",
    pipeline="StableDiffusionPipeline",
    pipelines=r"StableDiffusion(Img2Img|Inpaint|ControlNet\w*|PAG\w*)?Pipeline",
    parts=("unet", "vae", "text_encoder"),
    tokenizers=("tokenizer",),
    text=TEXT_1,
    configs=CONFIGS / "sd15",
    last_layer=True,
)
