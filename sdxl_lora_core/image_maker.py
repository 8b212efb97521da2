"""From prompt embeddings to pixels: UNet, then VAE, each applied with the options of the request at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import base_model
from .base_model import SDXLBase
from .base_parts import Part
from .config import GenerateConfig
from .guidance import guidance_interval, guidance_rescale
from .image_keys import attention_backend
from .loaded_parts import LoadedParts
from .lora_stack import StackEntry, load_merged, part_key, restack
from .micro_conditioning import micro_conditioning
from .prompts import stack_embeds
from .samplers import SOLVERS
from .schedulers import make_scheduler
from .text_model import TextEmbeds

VAE_SCALE = 8  # pixels to a latent cell
LATENT_CHANNELS = 4


@dataclass(frozen=True)
class ImageMaker:
    """Makes images of one request. Weights come from `parts` and stay there; nothing is loaded before it is needed."""

    base: SDXLBase
    config: GenerateConfig
    stack: Sequence[StackEntry]
    parts: LoadedParts
    dtype: torch.dtype

    def make(
        self,
        wanted: Sequence[TextEmbeds],
        unwanted: TextEmbeds | None,
        seeds: Sequence[int],
        on_step: Callable[[int], object],
    ) -> list[np.ndarray]:
        """The images (uint8 [H, W, 3]) of some prompts in one batch; without `unwanted` there is no guidance.

        `on_step` gets the number of steps done and may raise.
        """
        conditioning = _conditioning(wanted, unwanted)
        with _attention(self.config):
            return list(self._decode(self._denoise(conditioning, seeds, on_step)))

    def _denoise(
        self, conditioning: dict[str, Tensor], seeds: Sequence[int], on_step: Callable[[int], object]
    ) -> Tensor:
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        scheduler = make_scheduler(self.base, self.config, seeds)
        levels = scheduler.config.num_train_timesteps
        with self._phase("unet") as unet, guidance_interval(unet, self.config, levels):
            _slice_attention(unet, self.config.attention_slicing)
            return _pipeline(unet, scheduler)(
                **conditioning,
                **micro_conditioning(self.config)._asdict(),
                guidance_scale=self.config.guidance,
                guidance_rescale=guidance_rescale(self.base, self.config),
                eta=SOLVERS[self.config.sampler].eta,
                num_inference_steps=self.config.steps,
                width=self.config.width,
                height=self.config.height,
                latents=_noise(self.config, draws).to(self.dtype),
                generator=draws,
                output_type="latent",
                callback_on_step_end=lambda pipeline, step, timestep, tensors: _report(on_step, step),
            ).images

    def _decode(self, latents: Tensor) -> np.ndarray:
        with self._phase("vae") as vae:
            vae.use_slicing, vae.use_tiling = self.config.vae_slicing, self.config.vae_tiling
            unscaled = _unscaled(latents.to(vae.device, vae.dtype), vae.config)
            image = vae.decode(unscaled, return_dict=False)[0].float().cpu()
            _require_finite(image, latents, self.dtype, vae.dtype)
        pixels = (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        return (pixels * 255).round().astype(np.uint8)

    def _phase(self, part: Part) -> AbstractContextManager[Any]:
        key = part_key(self.base, part, self.dtype, self.stack)
        return self.parts.phase(
            part, key, lambda: self._load(part), offload_choice(self.config), lambda held: self._restack(part, held)
        )

    def _restack(self, part: Part, held: nn.Module) -> bool:
        return part != "vae" and restack(held, self.base, part, self.dtype, self.stack)

    def _load(self, part: Part) -> nn.Module:
        if part != "vae":
            return load_merged(self.base, part, self.dtype, self.stack)
        if self.dtype != torch.float16:
            return base_model.load_part(self.base, part, self.dtype)
        vae: Any = base_model.load_part(self.base, part, torch.float32)
        return vae if vae.config.force_upcast else vae.half()  # SDXL's own VAE overflows in fp16


def offload_choice(config: GenerateConfig) -> bool | None:
    """None leaves it to the owner of the parts."""
    return {"auto": None, "phase": True, "none": False}[config.offload]


def _pipeline(unet: nn.Module, scheduler: Any) -> Any:
    """Diffusers' SDXL pipeline around the UNet alone: text and VAE have their own phases."""
    from diffusers import StableDiffusionXLPipeline

    elsewhere = dict.fromkeys(["vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
    own: dict[str, Any] = {"unet": unet, "scheduler": scheduler}
    pipeline = StableDiffusionXLPipeline(**elsewhere, **own, force_zeros_for_empty_prompt=False, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _conditioning(wanted: Sequence[TextEmbeds], unwanted: TextEmbeds | None) -> dict[str, Tensor]:
    embeds = [*wanted, *[unwanted] * len(wanted)] if unwanted else [*wanted]
    named = {"prompt_embeds": stack_embeds([one.hidden[0] for one in embeds])}  # all of one length
    named["pooled_prompt_embeds"] = torch.cat([one.pooled for one in embeds])
    if not unwanted:
        return named
    halves = {name: tensor.chunk(2) for name, tensor in named.items()}
    return {prefix + name: half[side] for name, half in halves.items() for side, prefix in enumerate(("", "negative_"))}


def _report(on_step: Callable[[int], object], step: int) -> dict[str, Tensor]:
    on_step(step + 1)
    return {}  # nothing for the pipeline to replace


def _noise(config: GenerateConfig, draws: Sequence[torch.Generator]) -> Tensor:
    """float32 [B, 4, H/8, W/8], drawn on the CPU: the same on every device and at every precision."""
    size = (1, LATENT_CHANNELS, config.height // VAE_SCALE, config.width // VAE_SCALE)
    return torch.cat([torch.randn(size, generator=draw) for draw in draws])


def _unscaled(latents: Tensor, vae_config: Any) -> Tensor:
    """From the scale that the UNet sees to the VAE's own. Some VAEs also have a mean and a spread by channel."""
    if vae_config.latents_mean is None or vae_config.latents_std is None:
        return latents / vae_config.scaling_factor
    mean, spread = (latents.new_tensor(vae_config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
    return latents * spread / vae_config.scaling_factor + mean


def _attention(config: GenerateConfig) -> AbstractContextManager[Any]:
    if attention_backend(config) == "sdpa":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)


def _slice_attention(unet: nn.Module, sliced: bool) -> None:
    """Half of the heads at a time, or all at once again."""
    from diffusers.models.attention_processor import Attention

    attentions: Any = [module for module in unet.modules() if isinstance(module, Attention)]
    for attention in attentions:
        attention.set_attention_slice(max(1, attention.heads // 2) if sliced else None)


def _require_finite(image: Tensor, latents: Tensor, unet_dtype: torch.dtype, vae_dtype: torch.dtype) -> None:
    if not latents.isfinite().all():
        raise ValueError(
            f"the UNet gave values that are not finite (computed in {_plain(unet_dtype)}): set the base's precision to "
            "fp32 or bf16, or lower the LoRA strengths"
        )
    if not image.isfinite().all():
        raise ValueError(
            f"the VAE gave pixels that are not finite (computed in {_plain(vae_dtype)}): set the base's precision to "
            "fp32 or bf16, or use a base whose VAE is made for fp16"
        )


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
