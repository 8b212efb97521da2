"""Trains the tiny CLIP on all three styles; stops and continues at any time: python tools/world/make_clip.py --work DIR

Needs DIR/tokenizer. Every scene of a batch is there in all styles, with a caption for each style and one without style
words: style words must therefore distinguish the same content in two styles, and a caption without them must be
neutral.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from pathlib import Path

import torch
from make_base import prompt_for
from make_vae import random_scene, to_tensor
from torch.nn.functional import cross_entropy, interpolate
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

import world

SIDE = 64  # pixels that the model sees
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": SIDE},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": SIDE, "width": SIDE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {"vocab_size": len(tokenizer), "hidden_size": 96, "intermediate_size": 256, "projection_dim": 96}
    vision = {"image_size": SIDE, "patch_size": 16, "hidden_size": 96, "intermediate_size": 384, "projection_dim": 96}
    depth = {"num_hidden_layers": 4, "num_attention_heads": 3}
    return CLIPModel(CLIPConfig(text_config=text | ids | depth, vision_config=vision | depth, projection_dim=96))


def pixels(scenes: list[world.Scene], style: str) -> torch.Tensor:
    """[N,3,SIDE,SIDE] in [-1,1], made smaller as the processor does it."""
    drawings = to_tensor([world.draw(scene, style) for scene in scenes])
    return interpolate(drawings, SIDE, mode="bicubic", antialias=True).clamp(-1, 1)


def make_drawings(count: int) -> dict:
    """`count` scenes as uint8 [N,styles,3,SIDE,SIDE], made once; captions are chosen again in every step."""
    rng, kinds = random.Random("clip"), world.training_kinds()
    scenes = [random_scene(rng, kinds) for _ in range(count)]
    parts = [torch.stack([pixels(scenes[i : i + 64], style) for style in world.STYLES], 1) for i in range(0, count, 64)]
    kinds = [(scene.shape, scene.colour, scene.background) for scene in scenes]
    return {"images": (torch.cat(parts) * 127.5 + 127.5).round().byte(), "kinds": kinds}


def logits(clip: CLIPModel, tokenizer: CLIPTokenizer, images: torch.Tensor, captions: list[str]) -> torch.Tensor:
    tokens = tokenizer(captions, padding=True, truncation=True, max_length=77, return_tensors="pt")
    return clip(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=images).logits_per_image


def loss_of(clip: CLIPModel, tokenizer: CLIPTokenizer, data: dict, step: int, size: int) -> torch.Tensor:
    """InfoNCE both ways over `size` scenes in all styles; no shape, colour and background occur together twice."""
    rng = random.Random(f"clip {step}")
    picks = list({data["kinds"][i]: i for i in rng.sample(range(len(data["kinds"])), size)}.values())
    captions = [text for i in picks for text in captions_of(rng, data["kinds"][i])]
    images = soften(data["images"][picks].flatten(0, 1).float() / 127.5 - 1, rng, step)
    with torch.autocast("cpu", torch.bfloat16):
        scores = logits(clip, tokenizer, images, captions).float()
    fits = torch.block_diag(*[FITS] * len(picks))
    return (cross_entropy(scores, shares(fits)) + cross_entropy(scores.T, shares(fits.T))) / 2


# Which caption fits which drawing of one scene: the one without style words fits every style.
FITS = torch.eye(len(world.STYLES))
FITS[:, world.STYLES.index("plain")] = 1


def shares(fits: torch.Tensor) -> torch.Tensor:
    return fits / fits.sum(1, keepdim=True)


def captions_of(rng: random.Random, kind: tuple[str, str, str]) -> list[str]:
    """One for each style, in their order; the plain one in any of the base's phrasings."""
    return [
        prompt_for(rng, kind, empty=0) if style == "plain" else world.caption(world.Scene(*kind), style)
        for style in world.STYLES
    ]


def soften(images: torch.Tensor, rng: random.Random, step: int) -> torch.Tensor:
    """Shifted, and in half of the steps each blurred and noisy: generated images are."""
    images = images.roll((rng.randint(-4, 4), rng.randint(-4, 4)), dims=(2, 3))
    if rng.random() < 0.5:
        return images
    generator = torch.Generator().manual_seed(step)
    blurred = interpolate(interpolate(images, SIDE // 2, mode="area"), SIDE, mode="bilinear")
    images = images.lerp(blurred, torch.rand(len(images), 1, 1, 1, generator=generator))
    return images + 0.05 * torch.randn(images.shape, generator=generator)


@torch.no_grad()
def retrieval(clip: CLIPModel, tokenizer: CLIPTokenizer) -> dict[str, float]:
    """Top-1 among 100 held-out pairs: share of images whose own caption scores highest, by style and caption.

    And the share of style captions that score higher with their style than with the plain drawing of the same scene.
    """
    scenes = [world.Scene(*kind, variant=7) for kind in world.held_out_kinds()]
    plain = [world.caption(scene) for scene in scenes]
    found = {}
    for style in world.STYLES:
        images = pixels(scenes, style)
        for name, captions in (("plain", plain), (style, [world.caption(scene, style) for scene in scenes])):
            scores = logits(clip, tokenizer, images, captions)
            found[f"{style} drawings, {name} captions"] = (scores.argmax(1) == torch.arange(100)).float().mean().item()
            if name != "plain":
                other = logits(clip, tokenizer, pixels(scenes, "plain"), captions)
                found[f"{style} captions prefer {style} drawings"] = (scores > other).diag().float().mean().item()
    return found


def save(clip: CLIPModel, folder: Path) -> None:
    """With the classic tokenizer and processor files, which every transformers version reads."""
    clip.save_pretrained(folder)
    shutil.copytree(folder.parent / "tokenizer", folder, dirs_exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--minutes", type=float, default=1e9, help="the schedule ends at --steps or here")
    parser.add_argument("--batch", type=int, default=64, help="scenes; each comes in every style")
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    clip = new_clip(tokenizer)
    print(f"{sum(p.numel() for p in clip.parameters())} parameters", flush=True)
    if args.steps:
        train(clip, tokenizer, args)
    save(clip.eval(), args.work / "clip")


def train(clip: CLIPModel, tokenizer: CLIPTokenizer, args: argparse.Namespace) -> None:
    data, state_file, first = make_drawings(args.scenes), args.work / "clip.pt", 0
    optimizer = torch.optim.AdamW(clip.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=1e-2)
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        clip.load_state_dict(state["clip"]), optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    begun = time.time()
    for step in range(first, args.steps):
        done = max(step / args.steps, (time.time() - begun) / 60 / args.minutes)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 100) * (1 - done) + 1e-6
        loss = loss_of(clip, tokenizer, data, step, args.batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            clip.logit_scale.clamp_(max=4.6)
        if step % 50 == 49:
            print(f"step {step + 1} loss {loss.item():.4f} {(time.time() - begun) / 60:.1f} min", flush=True)
        if step % 200 == 199:
            torch.save({"clip": clip.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, state_file)
            print(retrieval(clip.eval(), tokenizer), flush=True)
            clip.train()
    print(retrieval(clip.eval(), tokenizer), flush=True)


if __name__ == "__main__":
    main()
