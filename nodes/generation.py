from __future__ import annotations

import functools
import json
import re
from typing import TYPE_CHECKING, Any

from ..sdxl_lora_core.control.control import Control
from ..sdxl_lora_core.generation.config import (
    ATTENTIONS,
    CACHE_MODES,
    LARGEST_SIDE,
    LONG_PROMPTS,
    OFFLOADS,
    PROMPT_SYNTAXES,
    GenerateConfig,
)
from ..sdxl_lora_core.generation.init_images import StartImage, start_images
from ..sdxl_lora_core.generation.samplers import SAMPLERS, SCHEDULES
from ..sdxl_lora_core.lora.stack import fit_of
from ..sdxl_lora_core.sdxl.base import SDXLBase
from . import choices
from .host.comfy import metadata, nothing
from .host.folders import cache_folder
from .host.memory import loaded_parts
from .host.progress import Progress
from .previews import show
from .widgets import Widget, widget
from .wires import CATEGORY, from_image, from_latent, from_mask, read_stack, to_image, to_latent

if TYPE_CHECKING:
    from ..sdxl_lora_core.generation.passes import GeneratedImage

_PROMPT = "a red circle on a navy background"  # which the bundled base can draw


class SDXLGenerateCached:
    """Makes images, or finds those again that were made with the same settings."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Generates images with an SDXL base and a stack of LoRAs. An image that was made before with the same "
        "content and settings comes from the disk cache in milliseconds, pixel for pixel."
    )
    SEARCH_ALIASES = ["sdxl sampler", "text to image", "txt2img", "cached generation", "dpm++ 2m karras", "ksampler"]
    RETURN_TYPES = ("IMAGE", "STRING", "STRING", "LATENT")
    RETURN_NAMES = ("images", "info", "prompts", "latents")
    OUTPUT_TOOLTIPS = (
        "All images as one batch: prompts outer, seeds inner.",
        "For each image its seed, cache key, whether it was found or made, and the seconds, as JSON.",
        "One line for each image: its prompt, without weights and embeddings.",
        "The images' latents, for core's nodes. Only with keep_latents; what hangs on it does not run otherwise.",
    )
    OUTPUT_NODE = True
    FUNCTION = "generate"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "base": ("SDXL_BASE", {"tooltip": "The model, from Load SDXL Base."}),
                "prompt": (
                    "STRING",
                    {"default": _PROMPT, "multiline": True, "tooltip": "What the image shows."},
                ),
                "negative_prompt": widget(
                    GenerateConfig, "negative_prompt", "STRING", "What the image should not show.", multiline=True
                ),
                "seed": widget(
                    GenerateConfig,
                    "seed",
                    "INT",
                    "Decides the noise that the image starts from. Image n of a prompt uses seed + n.",
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                ),
                "steps": widget(
                    GenerateConfig, "steps", "INT", "Denoising steps. 20 to 30 is enough for DPM++ 2M.", min=1, max=1000
                ),
                "guidance": widget(
                    GenerateConfig,
                    "guidance",
                    "FLOAT",
                    "How strongly the prompt is followed (CFG). 1 turns it off and halves the time.",
                    min=0.0,
                    max=100.0,
                    step=0.1,
                ),
                "width": widget(
                    GenerateConfig,
                    "width",
                    "INT",
                    "Width in pixels, a multiple of 8.",
                    min=64,
                    max=LARGEST_SIDE,
                    step=8,
                ),
                "height": widget(
                    GenerateConfig,
                    "height",
                    "INT",
                    "Height in pixels, a multiple of 8.",
                    min=64,
                    max=LARGEST_SIDE,
                    step=8,
                ),
                "count": widget(
                    GenerateConfig, "count", "INT", "Images for each prompt, with seeds that follow.", min=1, max=1024
                ),
                "sampler": widget(
                    GenerateConfig,
                    "sampler",
                    SAMPLERS,
                    "The solver, named as in KSampler. Not every one goes with every scheduler.",
                ),
                "scheduler": widget(GenerateConfig, "scheduler", SCHEDULES, "The noise levels, named as in KSampler."),
                "cache": widget(
                    GenerateConfig,
                    "cache",
                    CACHE_MODES,
                    "use: take images made before from disk. refresh: make and store them anew. off: neither. "
                    "only: take them from disk, and fail where one is missing.",
                ),
            },
            "optional": {
                "lora_stack": ("LORA_STACK", {"tooltip": "LoRAs to apply, from Load LoRA or Train SDXL LoRA."}),
                **_advanced(),
                "image": (
                    "IMAGE",
                    {
                        "tooltip": "Images to start from: one for all, or one for each that is made. Scaled to cover "
                        "width x height and cut in the middle. denoise says how much of them is painted over.",
                    },
                ),
                "mask": (
                    "MASK",
                    {
                        "tooltip": "Where image or latent is painted anew; the rest stays. Of the image's size.",
                    },
                ),
                "latent": (
                    "LATENT",
                    {
                        "tooltip": "Latents of width x height to start from instead. A noise mask set on them counts.",
                    },
                ),
                **_large_images(),
                "controls": ("SDXL_CONTROLS", {"tooltip": "ControlNets to steer by, from Add ControlNet (SDXL)."}),
            },
            "hidden": {"graph": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    @classmethod
    def IS_CHANGED(
        cls,
        cache: str | None = None,
        prompt: str | None = None,
        negative_prompt: str | None = None,
        prompt_syntax: str | None = None,
        **settings: Any,
    ) -> str | float:
        if cache == "refresh":
            return float("nan")
        return _embeddings(f"{prompt} {negative_prompt}") if prompt_syntax == "comfy" else ""

    def generate(
        self,
        base: SDXLBase,
        lora_stack: Any = None,
        image: Any = None,
        mask: Any = None,
        latent: Any = None,
        controls: tuple[Control, ...] | None = None,
        graph: Any = None,
        extra_pnginfo: Any = None,
        **settings: Any,
    ) -> dict[str, Any]:
        from ..sdxl_lora_core.generation.generate import generate

        config = GenerateConfig(**settings)
        loras = choices.lora_refs(read_stack(lora_stack))
        cache = cache_folder()
        with loaded_parts() as parts, Progress() as progress:
            images = generate(
                base,
                config,
                loras,
                starts=_starts(config, image, mask, latent),
                controls=controls or (),
                parts=parts,
                cache_folder=cache / "images",
                hash_memo=cache / "hashes",
                prompt_cache=cache,
                graph=metadata({"prompt": graph, "workflow": (extra_pnginfo or {}).get("workflow")}),
                find_embedding=choices.find_embedding,
                on_step=functools.partial(progress, phase="generating"),
                on_estimate=progress.on_estimate,
            )
            fit = [line for part in sorted(parts.borrowed) for line in fit_of(parts.held(part))]
        pixels = [image.pixels for image in images]
        info = json.dumps([_facts(image) for image in images], indent=2)
        prompts = "\n".join(image.words for image in images)
        texts = [image.texts for image in images]
        latents = [image.latents for image in images if image.latents is not None]
        latent_out = to_latent(latents) if latents else nothing()
        text = "\n".join([_summary(images), *fit])
        return show((to_image(pixels), info, prompts, latent_out), text, pixels, texts)


def _starts(config: GenerateConfig, image: Any, mask: Any, latent: Any) -> list[StartImage]:
    samples, set_masks = (None, []) if latent is None else from_latent(latent)
    masks = set_masks if mask is None else from_mask(mask)
    return start_images(config, [] if image is None else from_image(image), samples, masks)


def _embeddings(prompts: str) -> str:
    """Changes when an embedding file does that the prompts may name."""
    found = (choices.find_embedding(name.rstrip(",)")) for name in re.findall(r"embedding:([^\s:]+)", prompts))
    return " ".join(choices.stamp(path) for path in found if path)


def _facts(image: GeneratedImage) -> dict[str, Any]:
    return {
        "prompt": image.prompt,
        "seed": image.seed,
        "key": image.key,
        "from_cache": image.hit,
        "seconds": round(image.seconds, 3),
    }


def _summary(images: list[GeneratedImage]) -> str:
    found = sum(image.hit for image in images)
    seconds = sum(image.seconds for image in images)
    return f"{len(images)} image{'s' * (len(images) != 1)}, {found} from the cache, {seconds:.1f} s"


def _advanced() -> dict[str, Widget]:
    return {
        "prompt_per_line": widget(
            GenerateConfig, "prompt_per_line", "BOOLEAN", "Each line of prompt is a prompt of its own.", advanced=True
        ),
        "prompt_syntax": widget(
            GenerateConfig,
            "prompt_syntax",
            PROMPT_SYNTAXES,
            "plain: the prompt is read as it stands. comfy: as ComfyUI's own nodes read it, with (word:1.2), \\( and "
            "embedding:name; a long prompt is read to its end.",
            advanced=True,
        ),
        "batch_size": widget(
            GenerateConfig,
            "batch_size",
            "INT",
            "Images denoised together. More than 1 is faster on a GPU, but pixels then depend a little on the batch.",
            min=1,
            max=64,
            advanced=True,
        ),
        "attention": widget(
            GenerateConfig,
            "attention",
            ATTENTIONS,
            "How attention is computed. auto: PyTorch's own choice. math: slow and exact.",
            advanced=True,
        ),
        "attention_slicing": widget(
            GenerateConfig, "attention_slicing", "BOOLEAN", "Attention in slices: less memory, slower.", advanced=True
        ),
        "vae_slicing": widget(
            GenerateConfig, "vae_slicing", "BOOLEAN", "Decodes the images of a batch one by one.", advanced=True
        ),
        "vae_tiling": widget(
            GenerateConfig,
            "vae_tiling",
            "BOOLEAN",
            "Decodes in tiles whatever the size: images fit into little memory, seams can show.",
            advanced=True,
        ),
        "offload": widget(
            GenerateConfig,
            "offload",
            OFFLOADS,
            "phase: text encoders, UNet and VAE leave the GPU when their phase is over. none: they stay. "
            "auto: ComfyUI decides.",
            advanced=True,
        ),
        **{name: _micro_conditioning(name, tooltip) for name, tooltip in _MICRO_CONDITIONING.items()},
        "long_prompts": widget(
            GenerateConfig,
            "long_prompts",
            LONG_PROMPTS,
            "What becomes of a plain prompt over 77 tokens. cut: its end is not seen, which the log says. "
            "chunks: it is read on, 75 tokens at a time.",
            advanced=True,
        ),
        "guidance_rescale": widget(
            GenerateConfig,
            "guidance_rescale",
            "FLOAT",
            "Against the burnt look of strong guidance: 0 leaves it, 1 takes all of it back. -1: 0.7 for bases with "
            "zero terminal SNR, 0 for all others.",
            min=-1.0,
            max=1.0,
            step=0.05,
            advanced=True,
        ),
        "guidance_start": widget(
            GenerateConfig,
            "guidance_start",
            "FLOAT",
            "Guidance is off before this share of the way from noise to image, as start_percent in ComfyUI's nodes. "
            "0.2 or so gives more variety. Steps without guidance take half the time.",
            min=0.0,
            max=1.0,
            step=0.01,
            advanced=True,
        ),
        "guidance_end": widget(
            GenerateConfig,
            "guidance_end",
            "FLOAT",
            "Guidance is off after this share of the way. 0.8 or so saves time and changes little.",
            min=0.0,
            max=1.0,
            step=0.01,
            advanced=True,
        ),
        "denoise": widget(
            GenerateConfig,
            "denoise",
            "FLOAT",
            "With an image or latent to start from: how much of it is painted over. 1: all of it, 0.3: small changes. "
            "As in KSampler all steps are run, those at the end of a longer schedule.",
            min=0.01,
            max=1.0,
            step=0.01,
            advanced=True,
        ),
        "keep_latents": widget(
            GenerateConfig,
            "keep_latents",
            "BOOLEAN",
            "Gives the latents, too, and keeps them in the cache beside the image.",
            advanced=True,
        ),
    }


def _large_images() -> dict[str, Widget]:
    return {
        "vae_tiling_from": widget(
            GenerateConfig,
            "vae_tiling_from",
            "INT",
            "Images whose longer side has so many pixels or more are decoded in tiles. 0: none are.",
            min=0,
            max=LARGEST_SIDE,
            step=8,
            advanced=True,
        ),
        "hires_scale": widget(
            GenerateConfig,
            "hires_scale",
            "FLOAT",
            "Over 1 each image is enlarged so many times and denoised again at that size. SDXL draws best at about "
            "1024 x 1024 pixels and adds detail from there.",
            min=1.0,
            max=4.0,
            step=0.05,
            advanced=True,
        ),
        "hires_denoise": widget(
            GenerateConfig,
            "hires_denoise",
            "FLOAT",
            "How much the second pass paints over. 0.3 sharpens, 0.6 invents detail.",
            min=0.01,
            max=1.0,
            step=0.01,
            advanced=True,
        ),
        "hires_steps": widget(
            GenerateConfig,
            "hires_steps",
            "INT",
            "Denoising steps of the second pass. 0: as many as in the first.",
            min=0,
            max=1000,
            advanced=True,
        ),
    }


_MICRO_CONDITIONING = {
    "original_width": "Pixels. SDXL is told that the picture was once this wide: a small number gives a soft or coarse "
    "picture, a large one detail. 0: the image's own width.",
    "original_height": "The same for the height.",
    "crop_left": "Pixels. SDXL is told that so much was cut from the left: the subject moves out of the picture there. "
    "0, its default, is a subject in the middle.",
    "crop_top": "The same for the top.",
    "target_width": "Pixels. SDXL is told that the picture was cut to this width. 0: the image's own.",
    "target_height": "The same for the height.",
}


def _micro_conditioning(option: str, tooltip: str) -> Widget:
    return widget(GenerateConfig, option, "INT", tooltip, min=0, max=LARGEST_SIDE, advanced=True)
