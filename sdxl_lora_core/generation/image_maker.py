"""From prompt embeddings to pixels: UNet, then VAE, each with the options of the request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..control.control import Control, HintNumbers
from ..control.control_net import load_control_net, load_key
from ..control.control_residuals import ActiveControl
from ..lora.stack import StackEntry
from ..lora.stacked_part import StackedPart
from ..runtime.device import out_of_memory_named
from ..runtime.loaded_parts import Loaded, LoadedParts, PartRequest
from ..sdxl.base import SDXLBase, load_part
from ..sdxl.latents import VAE_SCALE, unscaled
from ..text.encoding import stack_embeds
from ..text.text_model import TextEmbeds
from .config import LARGEST_SIDE, GenerateConfig, attention_backend, micro_conditioning
from .denoise import Conditioning, Denoiser, step_options
from .guidance import guidance_of, is_guided, scale_embedding
from .init_images import EncodedStart, StartImage, encode_start, noise_latents, noised_starts
from .samplers import SOLVERS
from .schedulers import denoising_schedule
from .x0_estimate import OnEstimate

OnStep = Callable[[int], object]

# Memory for computing per pixel (VAE) and per latent cell (UNet), times the bytes of a number: ComfyUI's own estimate
# for SDXL.
_VAE_ROOM, _UNET_ROOM = 2200, 8400
_TILE = 1024  # pixels, of diffusers' tiled decoding for SDXL's VAE
_CONTROL_NET = "control_net "  # prefix of the names of these parts


class MadeImage(NamedTuple):
    """`pixels` uint8 [H, W, 3]; `latents` float32 [4, H/8, W/8] on the CPU, in the VAE's own scale.

    `lora_fit` has a line for each LoRA that was merged into the UNet.
    """

    pixels: np.ndarray
    latents: Tensor
    lora_fit: tuple[str, ...]


@dataclass(frozen=True)
class ImageBatch:
    """Inputs of images that are denoised together, one entry for each image.

    `negative` are the embeddings of the negative prompt, None without guidance. Without `starts` all images start from
    noise. `hints` has for each image the index of its hint in each ControlNet.
    """

    prompts: Sequence[TextEmbeds]
    negative: TextEmbeds | None
    seeds: Sequence[int]
    starts: Sequence[EncodedStart]
    hints: Sequence[HintNumbers]


@dataclass(frozen=True)
class ImageMaker:
    """Generates images of one request. Weights come from `parts`, and are loaded when they are needed."""

    base: SDXLBase
    config: GenerateConfig
    stack: Sequence[StackEntry]
    parts: LoadedParts
    dtype: torch.dtype
    controls: Sequence[Control] = ()
    on_estimate: OnEstimate | None = None

    def make(self, batch: ImageBatch, on_step: OnStep) -> list[MadeImage]:
        """Generates the images of a batch. `on_step` gets the number of UNet calls done and may raise to cancel."""
        with _attention(self.config):
            latents, fit = self._denoise(batch, on_step)
            return [MadeImage(pixels, own, fit) for pixels, own in self._decode(latents)]

    def encode(self, starts: Iterable[StartImage]) -> dict[StartImage, EncodedStart]:
        """Encodes each start alone, so that it does not depend on the others."""
        with self._vae_phase() as vae:
            return {start: encode_start(start, vae) for start in starts}

    def _denoise(self, batch: ImageBatch, on_step: OnStep) -> tuple[Tensor, tuple[str, ...]]:
        """The clean latents, and a line for each LoRA that was merged into the UNet."""
        generators = [torch.Generator().manual_seed(seed) for seed in batch.seeds]
        inpainting = None
        with self._unet_phase() as loaded, self._control_nets(batch.hints) as controls:
            unet: Any = loaded.module
            _slice_attention(unet, self.config.attention_slicing)
            schedule = denoising_schedule(self.base, self.config, batch.seeds, unet.device)
            if batch.starts:
                latents, inpainting = noised_starts(schedule, self.config, batch.starts, generators, unet)
            else:
                latents = noise_latents(schedule, self.config, generators, unet)
            embedding = scale_embedding(unet, self.config.guidance, len(batch.seeds))
            guidance = guidance_of(self.base, self.config) if embedding is None else None
            denoiser = Denoiser(unet, schedule, guidance, controls, inpainting, self.on_estimate, embedding)
            options = step_options(schedule.scheduler, generators, SOLVERS[self.config.sampler].eta)
            smaller = "lower batch_size, width or height, or set attention_slicing on"
            with out_of_memory_named(f"the UNet computes {self._size}", smaller):
                latents = denoiser.denoise(latents, self._conditioning(batch, unet), options, on_step)
            return latents, loaded.state.fit

    @property
    def _size(self) -> str:
        return f"{self.config.width}x{self.config.height}, batch_size {self.config.batch_size}"

    def _conditioning(self, batch: ImageBatch, unet: Any) -> Conditioning:
        """Negative prompt first, if there is one. The sizes are in the UNet's precision, as in diffusers' pipelines."""
        negative = [batch.negative] * len(batch.prompts) if batch.negative else []
        rows = [*negative, *batch.prompts]
        embeds = stack_embeds([row.hidden[0] for row in rows]).to(unet.device, unet.dtype)  # padded to one length
        if not self.base.family.is_sdxl:
            return Conditioning(embeds, {})
        sizes = [number for size in micro_conditioning(self.config) for number in size]
        added = {
            "text_embeds": torch.cat([row.pooled for row in rows]).to(unet.device),
            "time_ids": torch.tensor([sizes], dtype=unet.dtype, device=unet.device).repeat(len(rows), 1),
        }
        return Conditioning(embeds, added)

    def _decode(self, latents: Tensor) -> Iterator[tuple[np.ndarray, Tensor]]:
        """The pixels and the latents in the VAE's own scale of each image."""
        with self._vae_phase() as vae:
            encoded = unscaled(latents.to(vae.device, vae.dtype), vae.config)
            with out_of_memory_named(f"the VAE decodes {self._size}", "set vae_tiling or vae_slicing on"):
                image = vae.decode(encoded, return_dict=False)[0].float().cpu()
            _require_finite(image, latents, self.dtype, vae.dtype)
        pixels = (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        eight_bits = (pixels * 255).round().astype(np.uint8)
        return zip(eight_bits, encoded.float().cpu(), strict=True)

    @contextmanager
    def _control_nets(self, hints: Sequence[HintNumbers]) -> Iterator[list[ActiveControl]]:
        """Loads the ControlNets beside the UNet, and releases those of earlier requests."""
        requests = [self._control_request(control) for control in self.controls]
        if requests:
            self.parts.drop_others(_CONTROL_NET, [request.name for request in requests])
        with ExitStack() as phases:
            active: list[ActiveControl] = []
            for request, control, numbers in zip(requests, self.controls, zip(*hints, strict=True), strict=True):
                net = phases.enter_context(self.parts.phase(request)).module
                _slice_attention(net, self.config.attention_slicing)
                active.append(ActiveControl(net, [control.hints[number] for number in numbers], control.config))
            yield active

    def _control_request(self, control: Control) -> PartRequest:
        key = load_key(control.net, self.base, self.dtype)
        return PartRequest(
            f"{_CONTROL_NET}{control.net.sha256}",
            key,
            lambda: Loaded(load_control_net(control.net, self.base, self.dtype)),
            offload=offload_choice(self.config),
        )

    @contextmanager
    def _vae_phase(self) -> Iterator[Any]:
        at_once = 1 if self.config.vae_slicing else self.config.batch_size
        largest = _TILE if self.config.tiles_vae else LARGEST_SIDE
        pixels = min(self.config.width, largest) * min(self.config.height, largest)
        number = 4 if self.dtype == torch.float16 else self.dtype.itemsize  # most VAEs overflow in fp16
        key = StackedPart(self.base, "vae", self.dtype, ()).key
        room = pixels * at_once * number * _VAE_ROOM
        request = PartRequest("vae", key, self._load_vae, room=room, offload=offload_choice(self.config))
        with self.parts.phase(request) as loaded:
            vae: Any = loaded.module
            vae.use_slicing, vae.use_tiling = self.config.vae_slicing, self.config.tiles_vae
            yield vae

    def _load_vae(self) -> Loaded:
        if self.dtype != torch.float16:
            return Loaded(load_part(self.base, "vae", self.dtype))
        vae: Any = load_part(self.base, "vae", torch.float32)
        return Loaded(vae if vae.config.force_upcast else vae.half())  # SDXL's own VAE overflows in fp16

    def _unet_phase(self) -> AbstractContextManager[Loaded]:
        cells = (self.config.width // VAE_SCALE) * (self.config.height // VAE_SCALE)
        at_once = self.config.batch_size * (2 if is_guided(self.config) else 1)
        room = cells * at_once * self.dtype.itemsize * _UNET_ROOM
        unet = StackedPart(self.base, "unet", self.dtype, self.stack)
        return self.parts.phase(
            PartRequest("unet", unet.key, unet.load, unet.restack, room, offload_choice(self.config))
        )


def offload_choice(config: GenerateConfig) -> bool | None:
    """Whether parts leave the device after use; None leaves it to their owner."""
    return {"auto": None, "phase": True, "none": False}[config.offload]


def _attention(config: GenerateConfig) -> AbstractContextManager[Any]:
    if attention_backend(config) == "sdpa":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)


def _slice_attention(unet: nn.Module, sliced: bool) -> None:
    """Computes attention for half of the heads at a time, or for all at once again."""
    from diffusers.models.attention_processor import Attention

    attentions: Any = [module for module in unet.modules() if isinstance(module, Attention)]
    for attention in attentions:
        attention.set_attention_slice(max(1, attention.heads // 2) if sliced else None)


def _require_finite(image: Tensor, latents: Tensor, unet_dtype: torch.dtype, vae_dtype: torch.dtype) -> None:
    if not latents.isfinite().all():
        raise ValueError(
            f"the UNet returned values that are not finite (computed in {_plain(unet_dtype)}): set the base's "
            "precision to fp32 or bf16, or lower the LoRA strengths"
        )
    if not image.isfinite().all():
        raise ValueError(
            f"the VAE returned pixels that are not finite (computed in {_plain(vae_dtype)}): set the base's precision "
            "to fp32 or bf16, or use a base whose VAE is made for fp16"
        )


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
