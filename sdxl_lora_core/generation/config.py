"""The settings of a request for images."""

from __future__ import annotations

import dataclasses
from dataclasses import MISSING, dataclass
from typing import Literal

from ..sdxl.micro_conditioning import MicroConditioning
from ..settings import MAX_SEED, Range, check_settings, setting
from .samplers import Sampler, Schedule, require_pair

CacheMode = Literal["use", "refresh", "off", "only"]
PromptSyntax = Literal["plain", "comfy"]
LongPrompts = Literal["cut", "chunks"]
Attention = Literal["auto", "sdpa", "math"]
Offload = Literal["auto", "none", "phase"]
LARGEST_SIDE = 8192  # pixels
SIDE_MULTIPLE = 8  # pixels
BASES_RESCALE = -1.0  # guidance_rescale as the base needs it
NOISE_LEVELS = 1000

_PIXELS = Range(0, LARGEST_SIDE)
_SIDE = Range(64, LARGEST_SIDE, step=SIDE_MULTIPLE)
_FRACTION = Range(0.0, 1.0, step=0.01, rounded=True)
_DENOISE = Range(0.01, 1.0, step=0.01, rounded=True)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """One request for images: for each prompt `count` images with consecutive seeds.

    original_*, crop_* and target_* are SDXL's micro-conditioning (arXiv 2307.01952, section 2.2).
    """

    prompt: str = setting(MISSING, "What the image shows.")
    negative_prompt: str = setting("", "What the image should not show.")
    seed: int = setting(
        0, "Seed of the noise that the image starts from. Image n of a prompt uses seed + n.", Range(0, MAX_SEED)
    )
    steps: int = setting(25, "Denoising steps. 20 to 30 are enough for DPM++ 2M.", Range(1, 1000))
    guidance: float = setting(
        7.0,
        "Guidance scale (CFG): how closely the prompt is followed. 1 turns guidance off and halves the time.",
        Range(0.0, 100.0, step=0.1, rounded=True),
    )
    width: int = setting(1024, "Width in pixels, a multiple of 8.", _SIDE)
    height: int = setting(1024, "Height in pixels, a multiple of 8.", _SIDE)
    count: int = setting(1, "Number of images per prompt, with consecutive seeds.", Range(1, 1024))
    sampler: Sampler = setting(
        "dpmpp_2m", "The sampler, named as in KSampler. Not every sampler supports every scheduler."
    )
    scheduler: Schedule = setting("karras", "The noise schedule, named as in KSampler.")
    cache: CacheMode = setting(
        "use",
        "use: takes cached images from disk. refresh: generates and stores them again. off: neither reads nor stores. "
        "only: takes them from disk and fails if one is missing.",
    )
    prompt_per_line: bool = setting(
        False, "Each line of the prompt is a prompt of its own. Off: all lines are one prompt."
    )
    prompt_syntax: PromptSyntax = setting(
        "plain",
        "plain: the prompt is taken literally. comfy: ComfyUI's weights (word:1.2), embedding:name and prompts of any "
        "length, as its CLIP Text Encode reads them.",
    )
    batch_size: int = setting(
        1,
        "Images denoised together. More is faster and needs more memory; the pixels change slightly with it.",
        Range(1, 64),
    )
    attention: Attention = setting(
        "auto", "The attention implementation. auto and sdpa: PyTorch's fastest kernel. math: slow and exact."
    )
    attention_slicing: bool = setting(False, "Computes attention in slices: less memory, slower.")
    vae_slicing: bool = setting(False, "Decodes the images of a batch one by one: less memory.")
    vae_tiling: bool = setting(False, "Decodes in tiles at every size: much less memory, but seams may be visible.")
    offload: Offload = setting(
        "auto",
        "phase: text encoders, UNet and VAE leave the GPU after their phase. none: they stay. auto: ComfyUI decides.",
    )
    original_width: int = setting(
        0,
        "Micro-conditioning in pixels: the width of the original image. Small values give soft or coarse images, large "
        "ones detail. 0: the width of the image.",
        _PIXELS,
    )
    original_height: int = setting(0, "The same for the height.", _PIXELS)
    crop_left: int = setting(
        0,
        "Micro-conditioning in pixels: how much was cropped from the left. The subject moves out of the image on that "
        "side. 0, the default, centres it.",
        _PIXELS,
    )
    crop_top: int = setting(0, "The same for the top.", _PIXELS)
    target_width: int = setting(
        0, "Micro-conditioning in pixels: the width after cropping. 0: the width of the image.", _PIXELS
    )
    target_height: int = setting(0, "The same for the height.", _PIXELS)
    long_prompts: LongPrompts = setting(
        "cut",
        "How a plain prompt over 77 tokens is handled. cut: its end is ignored, and the log names it. chunks: it is "
        "encoded 75 tokens at a time.",
    )
    guidance_rescale: float = setting(
        BASES_RESCALE,
        "Reduces the overexposure of strong guidance: 0 not at all, 1 completely. -1: 0.7 for bases with zero terminal "
        "SNR, 0 for all others.",
        Range(BASES_RESCALE, 1.0, step=0.05, rounded=True),
    )
    guidance_start: float = setting(
        0.0,
        "The position between noise (0) and image (1) from which guidance acts, as start_percent in ComfyUI's nodes. "
        "About 0.2 gives more variety. Steps without guidance take half the time.",
        _FRACTION,
    )
    guidance_end: float = setting(
        1.0, "The position up to which guidance acts. About 0.8 saves time and changes little.", _FRACTION
    )
    denoise: float = setting(
        1.0,
        "With an image or latent to start from: how much of it is changed. 1: everything, 0.3: small changes. As in "
        "KSampler all steps are run, at the end of a longer schedule.",
        _DENOISE,
    )
    keep_latents: bool = setting(False, "Outputs the latents as well, and stores them in the cache with the image.")
    vae_tiling_from: int = setting(
        2048,
        "Images whose longer side has at least this many pixels are decoded in tiles. 0: never.",
        Range(0, LARGEST_SIDE, step=SIDE_MULTIPLE),
    )
    hires_scale: float = setting(
        1.0,
        "Above 1 each image is enlarged by this factor and denoised again at that size. SDXL composes best at about "
        "1024 x 1024 pixels and adds detail from there.",
        Range(1.0, 4.0, step=0.05, rounded=True),
    )
    hires_denoise: float = setting(
        0.5, "How much the second pass changes. 0.3 sharpens, 0.6 adds new detail.", _DENOISE
    )
    hires_steps: int = setting(0, "Denoising steps of the second pass. 0: as many as in the first.", Range(0, 1000))

    def __post_init__(self) -> None:
        check_settings(self)
        self._check_sides()
        if self.attention == "sdpa" and self.attention_slicing:
            raise ValueError("attention is 'sdpa' with attention_slicing on, which replaces it: turn one of them off")
        require_pair(self.sampler, self.scheduler)
        self._check_guidance()
        self._check_denoise()
        self._check_second_pass()

    def _check_sides(self) -> None:
        for side in ("width", "height"):
            value = getattr(self, side)
            if value % SIDE_MULTIPLE:
                near = round(value / SIDE_MULTIPLE) * SIDE_MULTIPLE
                raise ValueError(f"{side} is {value}: use a multiple of {SIDE_MULTIPLE}, such as {near}")

    def _check_guidance(self) -> None:
        if BASES_RESCALE < self.guidance_rescale < 0:
            raise ValueError(
                f"guidance_rescale is {self.guidance_rescale:g}: give a value from 0 to 1, or {BASES_RESCALE:g} for "
                "the value that the base needs"
            )
        if self.guidance_start >= self.guidance_end:
            raise ValueError(
                f"guidance_start is {self.guidance_start:g} and guidance_end {self.guidance_end:g}: the start must "
                "be lower; to turn guidance off, set guidance to 1"
            )

    def _check_denoise(self) -> None:
        if self.schedule_steps > NOISE_LEVELS:
            raise ValueError(
                f"denoise is {self.denoise:g} with {self.steps} steps, the end of a schedule of {self.schedule_steps} "
                f"steps, but SDXL has {NOISE_LEVELS} noise levels: raise denoise or lower steps"
            )

    def _check_second_pass(self) -> None:
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
        """The request for the image that the second pass enlarges; the whole request if there is no second pass."""
        return self if self.hires_scale == 1 else dataclasses.replace(self, hires_scale=1.0, keep_latents=False)

    @property
    def second_pass(self) -> GenerateConfig:
        """The request that denoises the enlarged images, at their size."""
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
        """The length of the whole schedule, of which the last `steps` are run, as KSampler defines denoise."""
        return int(self.steps / self.denoise)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompt, or one prompt for each line that is not empty."""
        if not self.prompt_per_line:
            return (self.prompt,)
        return tuple(line.strip() for line in self.prompt.splitlines() if line.strip()) or ("",)


def attention_backend(config: GenerateConfig) -> str:
    """The attention of a request: "sdpa", the fastest kernel of PyTorch, or "math", its reference implementation."""
    return "math" if config.attention == "math" else "sdpa"


def micro_conditioning(config: GenerateConfig) -> MicroConditioning:
    """The micro-conditioning of a request; a size of 0 stands for the size of the image."""
    return MicroConditioning(
        (config.original_height or config.height, config.original_width or config.width),
        (config.crop_top, config.crop_left),
        (config.target_height or config.height, config.target_width or config.width),
    )


def is_own_size(config: GenerateConfig) -> bool:
    """Whether the micro-conditioning is that of an uncropped image of the requested size, the usual case."""
    own = (config.height, config.width)
    return micro_conditioning(config) == MicroConditioning(own, (0, 0), own)
