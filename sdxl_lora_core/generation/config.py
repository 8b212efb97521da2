"""The settings of one request for images, their defaults and ranges."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

from ..sdxl.micro_conditioning import MicroConditioning
from ..settings import check_choice, check_range
from .samplers import SAMPLERS, SCHEDULES, Sampler, Schedule, require_pair

CacheMode = Literal["use", "refresh", "off", "only"]
PromptSyntax = Literal["plain", "comfy"]
LongPrompts = Literal["cut", "chunks"]
Attention = Literal["auto", "sdpa", "math"]
Offload = Literal["auto", "none", "phase"]
CACHE_MODES = get_args(CacheMode)
PROMPT_SYNTAXES = get_args(PromptSyntax)
LONG_PROMPTS = get_args(LongPrompts)
ATTENTIONS = get_args(Attention)
OFFLOADS = get_args(Offload)
MICRO_CONDITIONING = (
    "original_width",
    "original_height",
    "crop_left",
    "crop_top",
    "target_width",
    "target_height",
)
LARGEST_SIDE = 8192  # pixels
BASES_RESCALE = -1.0  # guidance_rescale as the base needs it
NOISE_LEVELS = 1000


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """One request for images. width and height are pixels; guidance 1 turns classifier-free guidance off.

    original_*, crop_* and target_* are SDXL's micro-conditioning in pixels; a size of 0 is the image's own.
    guidance_rescale is from 0 to 1, or BASES_RESCALE. Guidance acts from guidance_start to guidance_end, shares of the
    way from the noisiest of the base's noise levels to the cleanest.
    denoise is the share of the schedule that is run, its end, on an image or a latent that was given. keep_latents
    returns and caches each image's latents, too. vae_tiling_from is a longer side in pixels, 0 for none.
    hires_scale over 1 makes each image a second time, so many times as wide and high, from the first, enlarged: with
    hires_denoise, and in hires_steps steps (0: as many as the first).
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 25
    guidance: float = 7.0
    width: int = 1024
    height: int = 1024
    count: int = 1
    sampler: Sampler = "dpmpp_2m"
    scheduler: Schedule = "karras"
    cache: CacheMode = "use"

    prompt_per_line: bool = False
    prompt_syntax: PromptSyntax = "plain"
    batch_size: int = 1
    attention: Attention = "auto"
    attention_slicing: bool = False
    vae_slicing: bool = False
    vae_tiling: bool = False
    offload: Offload = "auto"
    original_width: int = 0
    original_height: int = 0
    crop_left: int = 0
    crop_top: int = 0
    target_width: int = 0
    target_height: int = 0
    long_prompts: LongPrompts = "cut"
    guidance_rescale: float = BASES_RESCALE
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    denoise: float = 1.0
    keep_latents: bool = False
    vae_tiling_from: int = 2048
    hires_scale: float = 1.0
    hires_denoise: float = 0.5
    hires_steps: int = 0

    def __post_init__(self) -> None:
        check_range(self, "seed", 0, 2**64 - 1)
        check_range(self, "steps", 1, 1000)
        check_range(self, "guidance", 0, 100)
        check_range(self, "count", 1, 1024)
        check_range(self, "batch_size", 1, 64)
        for side in ("width", "height"):
            check_range(self, side, 64, LARGEST_SIDE)
            if getattr(self, side) % 8:
                value = getattr(self, side)
                near = round(value / 8) * 8
                raise ValueError(f"{side} is {value}: give a multiple of 8, {near} for example")
        for option in MICRO_CONDITIONING:
            check_range(self, option, 0, LARGEST_SIDE)
        check_choice(self, "sampler", SAMPLERS)
        check_choice(self, "scheduler", SCHEDULES)
        check_choice(self, "cache", CACHE_MODES)
        check_choice(self, "prompt_syntax", PROMPT_SYNTAXES)
        check_choice(self, "long_prompts", LONG_PROMPTS)
        check_choice(self, "attention", ATTENTIONS)
        check_choice(self, "offload", OFFLOADS)
        if self.attention == "sdpa" and self.attention_slicing:
            raise ValueError("attention is 'sdpa' with attention_slicing on, which replaces it: turn one of them off")
        require_pair(self.sampler, self.scheduler)
        check_range(self, "vae_tiling_from", 0, LARGEST_SIDE)
        self._check_guidance()
        self._check_denoise()
        self._check_hires()

    def _check_guidance(self) -> None:
        if self.guidance_rescale != BASES_RESCALE and not 0 <= self.guidance_rescale <= 1:
            raise ValueError(
                f"guidance_rescale is {self.guidance_rescale:g}: give a value from 0 to 1, or {BASES_RESCALE:g} for "
                "what the base needs"
            )
        check_range(self, "guidance_start", 0, 1)
        check_range(self, "guidance_end", 0, 1)
        if self.guidance_start >= self.guidance_end:
            raise ValueError(
                f"guidance_start is {self.guidance_start:g} and guidance_end {self.guidance_end:g}: the start comes "
                "first; to turn guidance off, set guidance to 1"
            )

    def _check_denoise(self) -> None:
        check_range(self, "denoise", 0.01, 1)
        if self.schedule_steps > NOISE_LEVELS:
            raise ValueError(
                f"denoise is {self.denoise:g} with {self.steps} steps, which are the end of a schedule of "
                f"{self.schedule_steps} steps, but SDXL knows {NOISE_LEVELS} noise levels: raise denoise or lower steps"
            )

    def _check_hires(self) -> None:
        check_range(self, "hires_scale", 1, 4)
        check_range(self, "hires_denoise", 0.01, 1)
        check_range(self, "hires_steps", 0, 1000)
        if self.hires_scale == 1:
            return
        try:
            _ = self.second_pass
        except ValueError as error:
            raise ValueError(f"hires_scale is {self.hires_scale:g}, and for the second pass {error}") from None

    @property
    def tiles_vae(self) -> bool:
        return self.vae_tiling or 0 < self.vae_tiling_from <= max(self.width, self.height)

    @property
    def first_pass(self) -> GenerateConfig:
        """The request for what the second pass enlarges; all of it where there is none."""
        return self if self.hires_scale == 1 else dataclasses.replace(self, hires_scale=1.0, keep_latents=False)

    @property
    def second_pass(self) -> GenerateConfig:
        """The request that the enlarged images go through, in their size."""
        width, height = (round(side * self.hires_scale / 8) * 8 for side in (self.width, self.height))
        return dataclasses.replace(
            self,
            width=width,
            height=height,
            denoise=self.hires_denoise,
            steps=self.hires_steps or self.steps,
            hires_scale=1.0,
        )

    @property
    def schedule_steps(self) -> int:
        """The length of the whole schedule, of which the last `steps` are run: KSampler's meaning of denoise."""
        return int(self.steps / self.denoise)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The single prompt, or one for each line that is not empty."""
        if not self.prompt_per_line:
            return (self.prompt,)
        return tuple(line.strip() for line in self.prompt.splitlines() if line.strip()) or ("",)


def attention_backend(config: GenerateConfig) -> str:
    """ "sdpa": the fastest kernel that torch has here; "math": the plain formula."""
    return "math" if config.attention == "math" else "sdpa"


def micro_conditioning(config: GenerateConfig) -> MicroConditioning:
    """What a request asks for. A size of 0 is the image's own."""
    return MicroConditioning(
        (config.original_height or config.height, config.original_width or config.width),
        (config.crop_top, config.crop_left),
        (config.target_height or config.height, config.target_width or config.width),
    )


def is_own_size(config: GenerateConfig) -> bool:
    """Whether the model is told of a picture of the image's size that nothing was cut from: the usual case."""
    own = (config.height, config.width)
    return micro_conditioning(config) == MicroConditioning(own, (0, 0), own)
