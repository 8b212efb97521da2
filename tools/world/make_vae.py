"""Trains the tiny AutoencoderKL: python tools/world/make_vae.py --work DIR. Stops and continues at any time."""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn

import world

CROP = 64
LEARNING_RATE = 2e-3
LEVEL = 4.0
LOG_VARIANCE = -8.0


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(32, 32, 64, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        sample_size=world.SIZE,
        force_upcast=False,
    )


@torch.no_grad()
def warm_start(vae: AutoencoderKL) -> None:
    """Begins as a mosaic: three latent channels are the mean colour of a cell, and the decoder enlarges them.

    What is left to learn are the edges inside a cell. Channels 0-2 carry the colour; channels 3 and 4 are +LEVEL and
    -LEVEL, so that the last normalisation, which divides by the spread of all channels, keeps absolute colours.
    """
    for name, module in vae.named_modules():
        if name.endswith((".conv2", ".to_out.0")):
            module.weight.zero_(), module.bias.zero_()  # a block starts as the identity
        elif name.endswith((".downsamplers.0.conv", ".upsamplers.0.conv", ".conv_shortcut")):
            _pass_on(module, range(5), mean=".downsamplers" in name)
    _pass_on(vae.encoder.conv_in, range(3)), _pass_on(vae.decoder.conv_in, range(3))
    for part, channels in ((vae.encoder, 128), (vae.decoder, 32)):
        part.conv_in.weight[3:5] = 0
        part.conv_in.bias[3], part.conv_in.bias[4] = LEVEL, -LEVEL
        part.conv_norm_out.bias[:3] = LEVEL  # far from zero SiLU is nearly the identity
        _pass_on(part.conv_out, range(3))
        part.conv_out.weight[:3] *= LEVEL * (2 / channels) ** 0.5  # what the normalisation divides by
        part.conv_out.bias[:3] = -LEVEL * LEVEL * (2 / channels) ** 0.5
    vae.encoder.conv_out.weight[4:] = 0
    vae.encoder.conv_out.bias[4:] = LOG_VARIANCE
    _pass_on(vae.quant_conv, range(8)), _pass_on(vae.post_quant_conv, range(4))


def _pass_on(conv: nn.Module, channels: range, mean: bool = False) -> None:
    """These channels of a convolution hand their input on, as it is or as the mean of 2 x 2 pixels."""
    rows = slice(0, len(channels))
    conv.weight[rows], conv.bias[rows] = 0, 0
    middle = conv.kernel_size[0] // 2
    for i in channels:
        if mean:
            conv.weight[i, i, :2, :2] = 0.25
        else:
            conv.weight[i, i, middle, middle] = 1


def random_scene(rng: random.Random, kinds: list[tuple[str, str, str]]) -> world.Scene:
    return world.Scene(*rng.choice(kinds), variant=rng.randrange(1_000_000))


def training_image(rng: random.Random, kinds: list[tuple[str, str, str]]) -> Image.Image:
    """Mostly world drawings; now and then a mosaic of any colours, so that every cell has a crisp code."""
    if rng.random() < 0.04:
        noise = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        return Image.fromarray(noise).resize((world.SIZE, world.SIZE), Image.Resampling.NEAREST)
    return world.draw(random_scene(rng, kinds), rng.choice(["plain", "plain", "plain", "8-bit", "line"]))


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """[B,3,H,W] in -1..1."""
    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def batch_at(step: int, size: int, crop: int) -> torch.Tensor:
    rng = random.Random(f"vae {step}")
    kinds = world.training_kinds()
    images = []
    for _ in range(size):
        image = training_image(rng, kinds)
        left, top = (8 * rng.randint(0, (world.SIZE - crop) // 8) for _ in range(2))
        images.append(image.crop((left, top, left + crop, top + crop)))
    return to_tensor(images).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def psnr(vae: AutoencoderKL, style: str, count: int = 50) -> float:
    """Mean PSNR in dB over held-out drawings, through the posterior mean."""
    kinds = world.held_out_kinds()
    images = to_tensor([world.draw(world.Scene(*kinds[i], variant=7), style) for i in range(count)])
    decoded = torch.cat([vae(part).sample.clamp(-1, 1) for part in images.split(10)])
    mse = ((decoded - images) / 2).square().mean(dim=(1, 2, 3))
    return (-10 * mse.log10()).mean().item()


@torch.no_grad()
def latent_scale(vae: AutoencoderKL) -> float:
    """1 / std of the latents, as SDXL's 0.13025 is."""
    latents = torch.cat([vae.encode(batch_at(-1 - i, 16, world.SIZE)).latent_dist.mean for i in range(8)])
    return 1 / latents.std().item()


def loss_of(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.sample()).sample
    error = decoded.float() - pixels
    return error.square().mean() + 0.1 * error.abs().mean() + 1e-6 * posterior.kl().float().mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--minutes", type=float, default=1e9, help="the schedule ends at --steps or here")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    vae = new_vae().to(memory_format=torch.channels_last)
    warm_start(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-3)
    average = {name: p.detach().clone() for name, p in vae.named_parameters()}
    first, state_file = 0, args.work / "vae.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        vae.load_state_dict(state["vae"]), optimizer.load_state_dict(state["optimizer"])
        average, first = state["average"], state["step"]
    begun = time.time()
    for step in range(first, args.steps):
        done = max(step / args.steps, (time.time() - begun) / 60 / args.minutes)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 200) * (1 - done) + 1e-5
        whole = step % 2 or done > 0.7  # the normalisations and the attention must see whole images, too
        loss = loss_of(vae, batch_at(step, 2 + 2 * (done > 0.7) if whole else 8, world.SIZE if whole else CROP))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.999, (step + 1) / (step + 10))
        for name, parameter in vae.named_parameters():
            average[name].lerp_(parameter.detach(), 1 - decay)
        if step % 50 == 0:
            print(f"step {step} loss {loss.item():.5f} {(time.time() - begun) / 60:.1f} min", flush=True)
        if step % 500 == 499:
            torch.save(
                {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step + 1},
                state_file,
            )
            evaluate(vae, average, args.work)
    evaluate(vae, average, args.work)


def evaluate(vae: AutoencoderKL, average: dict[str, torch.Tensor], work: Path) -> None:
    """Saves the averaged weights as a diffusers folder and prints their PSNR."""
    copy = new_vae().eval()
    copy.load_state_dict(average)
    copy.register_to_config(scaling_factor=round(latent_scale(copy), 5))
    copy.save_pretrained(work / "vae")
    scores = {style: round(psnr(copy, style), 2) for style in world.STYLES}
    print(f"PSNR dB on held-out drawings: {scores}, scaling factor {copy.config.scaling_factor}", flush=True)


if __name__ == "__main__":
    main()
