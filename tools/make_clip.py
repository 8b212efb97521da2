"""Trains the tiny CLIP on all three styles: python tools/make_clip.py --work DIR. Stops and continues at any time.

Needs DIR/tokenizer. The caption of a styled drawing names the style in half the cases only, so a caption without style
words is neutral about style.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, interpolate
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

import world
from make_base import prompt_for
from make_vae import random_scene, to_tensor

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


def pixels(scenes: list[world.Scene], styles: list[str]) -> torch.Tensor:
    drawings = [world.draw(scene, style) for scene, style in zip(scenes, styles, strict=True)]
    return interpolate(to_tensor(drawings), SIDE, mode="area")


def make_drawings(count: int) -> dict:
    """Drawings as uint8 [N,3,SIDE,SIDE], made once; captions are chosen anew in every step."""
    rng, kinds = random.Random("clip"), world.training_kinds()
    scenes, styles = [random_scene(rng, kinds) for _ in range(count)], rng.choices(world.STYLES, k=count)
    parts = [pixels(scenes[i : i + 64], styles[i : i + 64]) for i in range(0, count, 64)]
    kinds = [(s.shape, s.colour, s.background, style) for s, style in zip(scenes, styles, strict=True)]
    return {"images": (torch.cat(parts) * 127.5 + 127.5).round().byte(), "kinds": kinds}


def logits(clip: CLIPModel, tokenizer: CLIPTokenizer, images: torch.Tensor, captions: list[str]) -> torch.Tensor:
    tokens = tokenizer(captions, padding=True, truncation=True, max_length=77, return_tensors="pt")
    return clip(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=images).logits_per_image


def loss_of(clip: CLIPModel, tokenizer: CLIPTokenizer, data: dict, step: int, size: int) -> torch.Tensor:
    """InfoNCE both ways over a batch in which no combination of shape, colour and background occurs twice."""
    rng = random.Random(f"clip {step}")
    picks = list({data["kinds"][i][:3]: i for i in rng.sample(range(len(data["kinds"])), size)}.values())
    captions = [caption_of(rng, data["kinds"][i]) for i in picks]
    images = data["images"][picks].float() / 127.5 - 1
    images = images.roll((rng.randint(-4, 4), rng.randint(-4, 4)), dims=(2, 3))
    if rng.random() < 0.5:  # generated images are a little soft and noisy
        images = images + 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(step))
    with torch.autocast("cpu", torch.bfloat16):
        scores = logits(clip, tokenizer, images, captions).float()
    target = torch.arange(len(picks))
    return (cross_entropy(scores, target) + cross_entropy(scores.T, target)) / 2


def caption_of(rng: random.Random, kind: tuple[str, str, str, str]) -> str:
    if kind[3] != "plain" and rng.random() < 0.5:
        return world.caption(world.Scene(*kind[:3]), kind[3])
    return prompt_for(rng, kind[:3], empty=0)


@torch.no_grad()
def retrieval(clip: CLIPModel, tokenizer: CLIPTokenizer) -> dict[str, float]:
    """Top-1 among 100 held-out pairs: share of images whose own caption scores highest, by style and caption."""
    scenes = [world.Scene(*kind, variant=7) for kind in world.held_out_kinds()]
    plain = [world.caption(scene) for scene in scenes]
    found = {}
    for style in world.STYLES:
        images = pixels(scenes, [style] * len(scenes))
        for name, captions in (("plain", plain), (style, [world.caption(scene, style) for scene in scenes])):
            scores = logits(clip, tokenizer, images, captions)
            found[f"{style} drawings, {name} captions"] = (scores.argmax(1) == torch.arange(100)).float().mean().item()
    return found


def save(clip: CLIPModel, folder: Path) -> None:
    """With the classic tokenizer and processor files, which every transformers version reads."""
    clip.save_pretrained(folder)
    shutil.copytree(folder.parent / "tokenizer", folder, dirs_exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--drawings", type=int, default=7000)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--minutes", type=float, default=1e9, help="the schedule ends at --steps or here")
    parser.add_argument("--batch", type=int, default=192)
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    clip = new_clip(tokenizer)
    print(f"{sum(p.numel() for p in clip.parameters())} parameters", flush=True)
    if args.steps:
        train(clip, tokenizer, args)
    save(clip.eval(), args.work / "clip")


def train(clip: CLIPModel, tokenizer: CLIPTokenizer, args: argparse.Namespace) -> None:
    data, state_file, first = make_drawings(args.drawings), args.work / "clip.pt", 0
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
