"""Trains the tiny SDXL's text encoders and UNet on plain drawings: python tools/world/make_base.py --work DIR.

Needs DIR/vae (make_vae.py) and DIR/tokenizer (make_tokenizer.py). Stops and continues at any time; every checkpoint
writes the averaged weights to DIR/unet, DIR/text_encoder and DIR/text_encoder_2.
"""

from __future__ import annotations

import argparse
import random
import string
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from make_tokenizer import PROMPT_WORDS
from make_vae import to_tensor
from PIL import Image
from torch import distributed, multiprocessing, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import world

WIDTHS = (64, 96)
TIME_IDS = 6
PATTERN = ("pattern", "", "")
TIME_ID_WIDTH = 32
PARTS = ("unet", "text_encoder", "text_encoder_2")
NOISE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def new_text_encoder(tokenizer: CLIPTokenizer, width: int, projected: bool) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=4,
        num_attention_heads=width // 32,
        hidden_act="gelu" if projected else "quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def new_unet() -> UNet2DConditionModel:
    """SDXL's layout; only the widths and the number of transformer blocks are smaller."""
    return UNet2DConditionModel(
        sample_size=world.SIZE // 8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 96, 96),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 3, 3),
        cross_attention_dim=sum(WIDTHS),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=TIME_IDS * TIME_ID_WIDTH + WIDTHS[1],
    )


NOISE_OFFSET = 0.2


class TinySDXL(nn.Module):
    """The three trained parts together, so that one optimizer and one average serve them all."""

    def __init__(self, work: Path) -> None:
        super().__init__()
        self.tokenizers = [CLIPTokenizer.from_pretrained(work / name) for name in ("tokenizer", "tokenizer_2")]
        self.unet = new_unet()
        self.text_encoder = new_text_encoder(self.tokenizers[0], WIDTHS[0], projected=False)
        self.text_encoder_2 = new_text_encoder(self.tokenizers[1], WIDTHS[1], projected=True)

    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """[B,77,sum of widths] from the last layer but one of both encoders, and the second's pooled [B,width]."""
        first, second = (
            tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
            for tokenizer in self.tokenizers
        )
        one = self.text_encoder(first, output_hidden_states=True)
        two = self.text_encoder_2(second, output_hidden_states=True)
        return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1), two.text_embeds

    def forward(
        self, noisy: torch.Tensor, steps: torch.Tensor, prompts: list[str], time_ids: torch.Tensor
    ) -> torch.Tensor:
        embeds, pooled = self.encode(prompts)
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return self.unet(noisy, steps, encoder_hidden_states=embeds, added_cond_kwargs=added).sample

    def save(self, work: Path) -> None:
        for part in PARTS:
            getattr(self, part).save_pretrained(work / part)


def conditioned_drawing(rng: random.Random, scene: world.Scene) -> tuple[Image.Image, list[int]]:
    """A plain drawing and its time ids (height, width, top, left, 128, 128).

    One in six is what an enlarged photo is to SDXL: taken from a smaller or larger original, and cropped off centre.
    """
    size, image = world.SIZE, world.draw(scene)
    if rng.random() > 1 / 6:
        return image, [size, size, 0, 0, size, size]
    original, top, left = rng.randrange(48, 513), rng.randrange(17), rng.randrange(17)
    if original < size:
        image = image.resize((original, original), Image.Resampling.BOX)
    image = image.resize((size + 16, size + 16), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size)), [original, original, top, left, size, size]


@torch.no_grad()
def make_latents(work: Path, count: int) -> None:
    """Scaled latents (posterior mean) of `count` drawings, spread evenly over the training kinds.

    And of a fifth as many abstract patterns, so that the first layers know hard cells, as SDXL's know many textures.
    """
    vae = AutoencoderKL.from_pretrained(work / "vae")
    rng, kinds = random.Random("base"), world.training_kinds()
    scenes = [world.Scene(*kinds[i % len(kinds)], variant=i // len(kinds)) for i in range(count)]
    latents, time_ids = [], []
    for first in range(0, count, 50):
        images, ids = zip(*(conditioned_drawing(rng, scene) for scene in scenes[first : first + 50]), strict=True)
        latents.append(vae.encode(to_tensor(list(images))).latent_dist.mean * vae.config.scaling_factor)
        time_ids.extend(ids)
    kept = [(s.shape, s.colour, s.background) for s in scenes]
    for _ in range(0, count // 5, 50):
        images = [world.draw_pattern(rng) for _ in range(50)]
        latents.append(vae.encode(to_tensor(images)).latent_dist.mean * vae.config.scaling_factor)
        time_ids.extend([[world.SIZE, world.SIZE, 0, 0, world.SIZE, world.SIZE]] * 50)
        kept.extend([PATTERN] * 50)
    torch.save({"latents": torch.cat(latents), "time_ids": torch.tensor(time_ids), "kinds": kept}, work / "latents.pt")


def prompt_for(rng: random.Random, kind: tuple[str, str, str], empty: float = 0.10) -> str:
    """A caption in any phrasing; some are empty; 15 % carry words that mean nothing, so that such words do no harm."""
    if rng.random() < empty:
        return ""
    if kind == PATTERN:
        return "an abstract pattern of blocks"
    text = world.caption(world.Scene(*kind), phrase=rng.randrange(len(world.PLAIN_PHRASES)))
    if rng.random() < 0.15:
        letters = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 7)))
        text = f"{' '.join(rng.choices([*PROMPT_WORDS, letters, letters, letters], k=rng.randint(1, 4)))} {text}"
    return text


def loss_of(model: TinySDXL, noise: DDPMScheduler, data: dict, step: int, size: int) -> torch.Tensor:
    """Epsilon's squared error, weighted by (min(SNR, 5) + 0.2) / SNR.

    That is Hang et al. 2023, and a share that counts when almost all is noise: there the colours are decided.
    """
    rng, generator = random.Random(f"base {step}"), torch.Generator().manual_seed(step)
    picks = [rng.randrange(len(data["kinds"])) for _ in range(size)]
    latents = data["latents"][picks]
    # The schedule's last step still shows an image's mean colour, which sampling starts without. An offset in the noise
    # hides it, so that colour must come from the prompt; SDXL itself was trained with one.
    offset = NOISE_OFFSET * torch.randn(size, 4, 1, 1, generator=generator)
    epsilon = torch.randn(latents.shape, generator=generator) + offset
    steps = (1000 * torch.rand(size, generator=generator) ** 0.75).long()  # somewhat more of the noisy steps
    noisy = noise.add_noise(latents, epsilon, steps)
    with torch.autocast("cpu", torch.bfloat16):
        prompts = [prompt_for(rng, data["kinds"][i]) for i in picks]
        predicted = model(noisy, steps, prompts, data["time_ids"][picks])
    snr = noise.alphas_cumprod[steps] / (1 - noise.alphas_cumprod[steps])
    error = (predicted.float() - epsilon).square().mean(dim=(1, 2, 3))
    return (error * (snr.clamp(max=5) + 0.2) / snr).mean()


def groups(model: nn.Module) -> list[dict]:
    """Token embeddings are not decayed: words that never occur, the styles', keep their first values."""
    tables = [p for name, p in model.named_parameters() if "embedding" in name]
    rest = [p for name, p in model.named_parameters() if "embedding" not in name]
    return [{"params": rest, "weight_decay": 1e-2}, {"params": tables, "weight_decay": 0.0}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--drawings", type=int, default=12000)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--minutes", type=float, default=1e9, help="the schedule ends at --steps or here")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each that share a batch")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = TinySDXL(args.work)
    print({part: sum(p.numel() for p in getattr(model, part).parameters()) for part in PARTS}, flush=True)
    if args.steps == 0:
        model.save(args.work)
        return
    if not (args.work / "latents.pt").exists():
        make_latents(args.work, args.drawings)
    multiprocessing.spawn(train, (args,), args.workers)


def train(rank: int, args: argparse.Namespace) -> None:
    """One of the workers. Small layers leave a second thread idle: two processes are twice as fast as two threads."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:29517", rank=rank, world_size=args.workers)
    torch.manual_seed(0)
    model, noise = TinySDXL(args.work), DDPMScheduler(**NOISE)
    model.unet.set_attn_processor(
        AttnProcessor()
    )  # on a CPU plain attention trains 1.5 times faster than the fused one
    model.text_encoder.set_attn_implementation("eager")
    model.text_encoder_2.set_attn_implementation("eager")
    data = torch.load(args.work / "latents.pt", weights_only=True)
    optimizer = torch.optim.AdamW(groups(model), lr=args.lr, betas=(0.9, 0.99), fused=True)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    step, state_file = 0, args.work / "base.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"]), optimizer.load_state_dict(state["optimizer"])
        average, step = state["average"], state["step"]
    begun, mean, done = time.time(), 0.0, 0.0
    while done < 1:
        loss = loss_of(model, noise, data, step * args.workers + rank, args.batch // args.workers)
        loss.backward()
        shown, done = share_gradients(model, loss, max(step / args.steps, (time.time() - begun) / 60 / args.minutes))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 150) * max(0, 1 - done) + 1e-6
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, mean = step + 1, mean + shown / 50
        if rank == 0:
            follow(average, model, step)
            if step % 50 == 0:
                print(f"step {step} loss {mean:.4f} {(time.time() - begun) / 60:.1f} min", flush=True)
                mean = 0.0
            if step % 250 == 0 or done >= 1:
                checkpoint(model, optimizer, average, step, args.work)


def share_gradients(model: nn.Module, loss: torch.Tensor, done: float) -> tuple[float, float]:
    """Averages gradients, loss and the share of the time that is gone over all workers."""
    wanted = [p for p in model.parameters() if p.grad is not None]
    flat = torch.cat([p.grad.flatten() for p in wanted] + [torch.tensor([loss.item(), done])])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for parameter, part in zip(wanted, flat[:-2].split([p.numel() for p in wanted]), strict=True):
        parameter.grad.copy_(part.view_as(parameter))
    return flat[-2].item(), flat[-1].item()


def follow(average: dict[str, torch.Tensor], model: nn.Module, step: int) -> None:
    decay = min(0.998, step / (step + 10))
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            average[name].lerp_(value, 1 - decay)


def checkpoint(
    model: TinySDXL, optimizer: torch.optim.Optimizer, average: dict[str, torch.Tensor], step: int, work: Path
) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step}
    torch.save(state, work / "base.pt")
    copy = TinySDXL(work)
    copy.load_state_dict(average)
    copy.save(work)


if __name__ == "__main__":
    main()
