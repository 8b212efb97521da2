"""From prompt embeddings to pixels: UNet, then VAE, each applied with the options of the request at hand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..control.control import Control, HintNumbers
from ..control.control_net import load_control_net, load_key
from ..control.controlled_unet import ActiveControl, controlled
from ..lora.stack import StackEntry, load_merged, part_key, restack
from ..runtime.loaded_parts import LoadedParts
from ..sdxl.base import SDXLBase, load_part
from ..sdxl.latents import VAE_SCALE, unscaled
from ..sdxl.loading import Part
from ..text.encoding import stack_embeds
from ..text.text_model import TextEmbeds
from .config import LARGEST_SIDE, GenerateConfig, attention_backend, micro_conditioning
from .guidance import guidance_interval, guidance_rescale, is_guided
from .init_images import EncodedStart, PutBack, StartImage, begin, encode_start
from .samplers import SOLVERS
from .schedulers import make_scheduler
from .x0_estimate import OnEstimate, tell_estimates

OnStep = Callable[[int], object]

# Bytes that computing takes for each pixel (VAE) and each latent cell (UNet), times the bytes of a number: as much as
# ComfyUI reckons with for its own SDXL.
_VAE_ROOM, _UNET_ROOM = 2200, 8400
_TILE = 1024  # pixels, of diffusers' tiled decoding for SDXL's VAE
_CONTROL_NET = "control_net "  # how the names of these parts begin


class MadeImage(NamedTuple):
    """`pixels` uint8 [H, W, 3]; `latents` float32 [4, H/8, W/8] on the CPU, in the VAE's own scale."""

    pixels: np.ndarray
    latents: Tensor


@dataclass(frozen=True)
class ImageMaker:
    """Makes images of one request. Weights come from `parts` and stay there; nothing is loaded before it is needed."""

    base: SDXLBase
    config: GenerateConfig
    stack: Sequence[StackEntry]
    parts: LoadedParts
    dtype: torch.dtype
    controls: Sequence[Control] = ()
    on_estimate: OnEstimate | None = None

    def make(
        self,
        wanted: Sequence[TextEmbeds],
        unwanted: TextEmbeds | None,
        seeds: Sequence[int],
        starts: Sequence[EncodedStart],
        hints: Sequence[HintNumbers],
        on_step: OnStep,
    ) -> list[MadeImage]:
        """The images of some prompts in one batch: without `unwanted` no guidance, without `starts` from noise alone.

        `hints` says for each image which of each control's hints is its own.
        `on_step` gets the number of steps done and may raise.
        """
        conditioning = _conditioning(wanted, unwanted)
        with _attention(self.config):
            return self._decode(self._denoise(conditioning, seeds, starts, hints, on_step))

    def encode(self, starts: Iterable[StartImage]) -> dict[StartImage, EncodedStart]:
        """Each encoded alone, so that it does not depend on the others."""
        with self._vae_phase() as vae:
            return {start: encode_start(start, vae) for start in starts}

    def _denoise(
        self,
        conditioning: dict[str, Tensor],
        seeds: Sequence[int],
        starts: Sequence[EncodedStart],
        hints: Sequence[HintNumbers],
        on_step: OnStep,
    ) -> Tensor:
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        schedule = {"num_inference_steps": self.config.schedule_steps}
        scheduler = make_scheduler(self.base, self.config, seeds)
        if self.on_estimate:
            tell_estimates(scheduler, self.on_estimate)
        levels = scheduler.config.num_train_timesteps
        with (
            self._unet_phase() as unet,
            self._control_nets(hints) as controls,
            guidance_interval(unet, self.config, levels),
            controlled(unet, controls, levels),
        ):
            _slice_attention(unet, self.config.attention_slicing)
            pipeline = _pipeline(unet, scheduler, bool(starts))
            beginning = begin(pipeline, schedule, self.config, starts, draws)
            return pipeline(
                **conditioning,
                **micro_conditioning(self.config)._asdict(),
                **schedule,
                **beginning.arguments,
                guidance_scale=self.config.guidance,
                guidance_rescale=guidance_rescale(self.base, self.config),
                eta=SOLVERS[self.config.sampler].eta,
                generator=draws,
                output_type="latent",
                callback_on_step_end=functools.partial(_after_step, on_step, beginning.put_back),
            ).images

    def _decode(self, latents: Tensor) -> list[MadeImage]:
        with self._vae_phase() as vae:
            encoded = unscaled(latents.to(vae.device, vae.dtype), vae.config)
            image = vae.decode(encoded, return_dict=False)[0].float().cpu()
            _require_finite(image, latents, self.dtype, vae.dtype)
        pixels = (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        eight_bits = (pixels * 255).round().astype(np.uint8)
        return [MadeImage(*pair) for pair in zip(eight_bits, encoded.float().cpu(), strict=True)]

    @contextmanager
    def _control_nets(self, hints: Sequence[HintNumbers]) -> Iterator[list[ActiveControl]]:
        """Beside the UNet, which needs them in the same moment. Those of earlier requests make room."""
        parts = [f"{_CONTROL_NET}{control.net.sha256}" for control in self.controls]
        if parts:
            self.parts.drop_others(_CONTROL_NET, parts)
        with ExitStack() as phases:
            active: list[ActiveControl] = []
            for part, control, numbers in zip(parts, self.controls, zip(*hints, strict=True), strict=True):
                key = load_key(control.net, self.base, self.dtype)
                load = functools.partial(load_control_net, control.net, self.base, self.dtype)
                net = phases.enter_context(self.parts.phase(part, key, load, offload_choice(self.config)))
                _slice_attention(net, self.config.attention_slicing)
                active.append(ActiveControl(net, [control.hints[number] for number in numbers], control.config))
            yield active

    @contextmanager
    def _vae_phase(self) -> Iterator[Any]:
        at_once = 1 if self.config.vae_slicing else self.config.batch_size
        largest = _TILE if self.config.tiles_vae else LARGEST_SIDE
        pixels = min(self.config.width, largest) * min(self.config.height, largest)
        number = 4 if self.dtype == torch.float16 else self.dtype.itemsize  # most VAEs are too wide for fp16
        with self._phase("vae", pixels * at_once * number * _VAE_ROOM) as vae:
            vae.use_slicing, vae.use_tiling = self.config.vae_slicing, self.config.tiles_vae
            yield vae

    def _phase(self, part: Part, room: int) -> AbstractContextManager[Any]:
        key = part_key(self.base, part, self.dtype, self.stack)
        return self.parts.phase(
            part,
            key,
            lambda: self._load(part),
            offload_choice(self.config),
            lambda held: self._restack(part, held),
            room,
        )

    def _unet_phase(self) -> AbstractContextManager[Any]:
        cells = (self.config.width // VAE_SCALE) * (self.config.height // VAE_SCALE)
        at_once = self.config.batch_size * (2 if is_guided(self.config) else 1)
        return self._phase("unet", cells * at_once * self.dtype.itemsize * _UNET_ROOM)

    def _restack(self, part: Part, held: nn.Module) -> bool:
        return part != "vae" and restack(held, self.base, part, self.dtype, self.stack)

    def _load(self, part: Part) -> nn.Module:
        if part != "vae":
            return load_merged(self.base, part, self.dtype, self.stack)
        if self.dtype != torch.float16:
            return load_part(self.base, part, self.dtype)
        vae: Any = load_part(self.base, part, torch.float32)
        return vae if vae.config.force_upcast else vae.half()  # SDXL's own VAE overflows in fp16


def offload_choice(config: GenerateConfig) -> bool | None:
    """None leaves it to the owner of the parts."""
    return {"auto": None, "phase": True, "none": False}[config.offload]


def _pipeline(unet: nn.Module, scheduler: Any, from_image: bool) -> Any:
    """Diffusers' SDXL pipeline around the UNet alone: text and VAE have their own phases."""
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

    elsewhere = dict.fromkeys(["vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
    own: dict[str, Any] = {"unet": unet, "scheduler": scheduler}
    pipeline_class = StableDiffusionXLImg2ImgPipeline if from_image else StableDiffusionXLPipeline
    pipeline = pipeline_class(**elsewhere, **own, force_zeros_for_empty_prompt=False, add_watermarker=False)
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


def _after_step(
    on_step: OnStep, put_back: PutBack, pipeline: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What the pipeline calls; it goes on with the latents that it gets back."""
    on_step(step + 1)
    return {"latents": put_back(pipeline, step, tensors["latents"])}


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
