from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..sdxl_lora_core.files import stat_fingerprint
from ..sdxl_lora_core.generation.config import GenerateConfig
from ..sdxl_lora_core.generation.init_images import StartImage, start_images
from ..sdxl_lora_core.generation.job import GenerationContext, GenerationJob
from ..sdxl_lora_core.images.c2pa_signature import require_own_signature
from ..sdxl_lora_core.lora.stack import LoRARef
from ..sdxl_lora_core.runtime.loaded_parts import LoadedParts
from ..sdxl_lora_core.sdxl.base import SDXLBase, size_note
from . import choices
from .host.comfy import metadata, nothing
from .host.folders import cache_folders
from .host.memory import loaded_parts
from .host.progress import Progress
from .previews import show
from .widgets import link, settings_in, widget, widgets
from .wires import CATEGORY, from_image, from_latent, from_mask, read_stack, to_image, to_latent

if TYPE_CHECKING:
    from ..sdxl_lora_core.generation.passes import GeneratedImage

_PROMPT = "a red circle on a navy background"  # which the bundled base can generate
_FACE = ("steps", "guidance", "width", "height", "count", "sampler", "scheduler", "cache")
_ADVANCED = (
    "prompt_per_line",
    "prompt_syntax",
    "batch_size",
    "attention",
    "attention_slicing",
    "vae_slicing",
    "vae_tiling",
    "offload",
    "original_width",
    "original_height",
    "crop_left",
    "crop_top",
    "target_width",
    "target_height",
    "long_prompts",
    "guidance_rescale",
    "guidance_start",
    "guidance_end",
    "denoise",
    "keep_latents",
)
_SECOND_PASS = ("vae_tiling_from", "hires_scale", "hires_denoise", "hires_steps")
_STARTS = {
    "image": link(
        "IMAGE",
        "Images to start from: one for all, or one for each generated image. Scaled to cover width x height and "
        "cropped to the centre. denoise sets how much of them is changed.",
    ),
    "mask": link("MASK", "Where image or latent is repainted; the rest is kept. Of the image's size."),
    "latent": link("LATENT", "Latents of width x height to start from instead. A noise mask set on them is used."),
}


class SDXLGenerateCached:
    """Generates images, or finds them in the cache if they were generated with the same settings."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Generates images with an SDXL base and a stack of LoRAs. An image that was generated before with the same "
        "content and settings comes from the disk cache in milliseconds, pixel for pixel."
    )
    SEARCH_ALIASES = ["sdxl sampler", "text to image", "txt2img", "cached generation", "ksampler", "compare loras"]
    RETURN_TYPES = ("IMAGE", "STRING", "STRING", "LATENT")
    RETURN_NAMES = ("images", "info", "prompts", "latents")
    OUTPUT_TOOLTIPS = (
        "All images as one batch, ordered by prompt, then by seed.",
        "For each image its seed, cache key, whether it came from the cache, and the seconds it took, as JSON.",
        "One line for each image: its prompt, without weights and embeddings.",
        "The images' latents, for ComfyUI's nodes. Only with keep_latents; connected nodes do not run otherwise.",
    )
    OUTPUT_NODE = True
    FUNCTION = "generate"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "base": link("SDXL_BASE", "The model, from Load SDXL Base."),
                "prompt": widget(GenerateConfig, "prompt", default=_PROMPT, multiline=True),
                "negative_prompt": widget(GenerateConfig, "negative_prompt", multiline=True),
                "seed": widget(GenerateConfig, "seed", control_after_generate=True),
                **widgets(GenerateConfig, _FACE),
            },
            "optional": {
                "lora_stack": link("LORA_STACK", "LoRAs to apply, from Load LoRA or Train SDXL LoRA."),
                **widgets(GenerateConfig, _ADVANCED, advanced=True),
                **_STARTS,
                **widgets(GenerateConfig, _SECOND_PASS, advanced=True),
                "controls": link("SDXL_CONTROLS", "ControlNets to use, from Add ControlNet (SDXL)."),
            },
            "hidden": {"graph": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    @classmethod
    def IS_CHANGED(cls, cache: str | None = None, prompt_syntax: str | None = None, **inputs: Any) -> str | float:
        if cache == "refresh":
            return float("nan")
        prompts = f"{inputs.get('prompt')} {inputs.get('negative_prompt')}"
        return _embeddings(prompts) if prompt_syntax == "comfy" else ""

    def generate(self, base: SDXLBase, lora_stack: Any = None, controls: Any = None, **inputs: Any) -> dict[str, Any]:
        from ..sdxl_lora_core.generation.generate import generate

        require_own_signature()  # before the long work
        config = GenerateConfig(**settings_in(GenerateConfig, inputs))
        loras = choices.lora_refs(read_stack(lora_stack))
        job = GenerationJob(base, config, loras, _starts(config, inputs), controls or ())
        with loaded_parts() as parts, Progress() as progress:
            progress.note(size_note(base, max(config.width, config.height), "width and height"))
            images = generate(job, generation_context(parts, progress, inputs))
        return _outputs(images, loras)


def generation_context(parts: LoadedParts, progress: Progress, inputs: Mapping[str, Any]) -> GenerationContext:
    """What `generate` needs in ComfyUI; `inputs` are the node's, with the hidden graph."""
    workflow = (inputs.get("extra_pnginfo") or {}).get("workflow")
    return GenerationContext(
        parts=parts,
        cache=cache_folders(),
        graph=metadata({"prompt": inputs.get("graph"), "workflow": workflow}),
        find_embedding=choices.find_embedding,
        on_step=functools.partial(progress, phase="generating"),
        on_detail=progress.on_detail,
        on_estimate=progress.on_estimate,
    )


def _starts(config: GenerateConfig, inputs: Mapping[str, Any]) -> list[StartImage]:
    image, mask, latent = (inputs.get(name) for name in _STARTS)
    samples, set_masks = (None, []) if latent is None else from_latent(latent)
    masks = set_masks if mask is None else from_mask(mask)
    return start_images(config, [] if image is None else from_image(image), samples, masks)


def _embeddings(prompts: str) -> str:
    """A text that changes with the embedding files that the prompts may name."""
    found = (choices.find_embedding(name.rstrip(",)")) for name in re.findall(r"embedding:([^\s:]+)", prompts))
    return " ".join(stat_fingerprint(path) for path in found if path)


def _outputs(images: Sequence[GeneratedImage], loras: Sequence[LoRARef]) -> dict[str, Any]:
    pixels = [image.pixels for image in images]
    info = json.dumps([_facts(image) for image in images], indent=2)
    prompts = "\n".join(image.words for image in images)
    latents = [image.latents for image in images if image.latents is not None]
    fit = dict.fromkeys(line for image in images for line in image.lora_fit)
    stack = [f"LoRA {lora.name} at {lora.strength_model:g}, text {lora.strength_clip:g}" for lora in loras]
    outputs = (to_image(pixels), info, prompts, to_latent(latents) if latents else nothing())
    text = "\n".join([_summary(images), *(fit or stack)])
    made = [{"from_cache": image.hit, "seconds": round(image.seconds, 3), "seed": image.seed} for image in images]
    return show(outputs, text, pixels, [image.texts for image in images], made=made)


def _facts(image: GeneratedImage) -> dict[str, Any]:
    return {
        "prompt": image.prompt,
        "seed": image.seed,
        "key": image.key,
        "from_cache": image.hit,
        "seconds": round(image.seconds, 3),
    }


def _summary(images: Sequence[GeneratedImage]) -> str:
    found = sum(image.hit for image in images)
    seconds = sum(image.seconds for image in images)
    return f"{len(images)} image{'s' * (len(images) != 1)}, {found} from the cache, in {seconds:.1f} s."
