"""Runs the same jobs with the working tree and with another revision, and compares the bytes that they write.

    python tools/compare_with.py 634e8f8
    python tools/compare_with.py HEAD~3 --steps 4 --only lora euler

The jobs are graphs for tools/run_workflow.py: trainings (LoRA files, embeddings, the identity of the run) and
generations (PNG files and image keys). Each tree runs them in a process of its own, with this Python, with empty caches
and without a GPU, which is not deterministic by default. The exit code is 1 if anything differs or is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "example_workflows/api/train_and_compare.json"
BASE, DATASET, CONTROL_NET = "tiny-sdxl (bundled)", "sample: 8-bit (bundled)", "random"
STYLES = "8bit_style (bundled)", "line_style (bundled)"
PROMPT = "a red circle on a navy background"
WIDTH, HEIGHT = 96, 64

Node = dict[str, Any]
Workflow = dict[str, Node]  # an input that is not a link may be a tensor: run_workflow passes it on
Outputs = dict[str, tuple[list[Any], ...]]


def node(class_type: str, **inputs: Any) -> Node:
    return {"class_type": class_type, "inputs": inputs}


# Trainings


def demo_training(steps: int | None) -> Workflow:
    """The training of tools/demo.py, in `steps` where they are given."""
    graph = json.loads(DEMO.read_text(encoding="utf-8"))
    (train,) = (key for key, found in graph.items() if found["class_type"] == "TrainSDXLLoRA")
    inputs = graph[train]["inputs"]
    needed = [train, *(value[0] for value in inputs.values() if isinstance(value, list))]
    inputs["steps"] = steps or inputs["steps"]
    return {key: graph[key] for key in needed}


def training(name: str, options: Iterable[Node], trigger_word: str = "", sample_prompts: str = "") -> Workflow:
    """A few steps. The option nodes are chained."""
    graph = {"base": node("LoadSDXLBase", base=BASE, precision="fp32")}
    graph["dataset"] = node(
        "LoadCaptionDataset", folder=DATASET, trigger_word=trigger_word, resolution=64, validation_percent=20, flip=True
    )
    chain: dict[str, Any] = {}
    for number, option in enumerate(options):
        graph[f"options {number}"] = node(option["class_type"], **option["inputs"], **chain)
        chain = {"options": [f"options {number}", 0]}
    graph["train"] = node(
        "TrainSDXLLoRA",
        base=["base", 0],
        dataset=["dataset", 0],
        **chain,
        lora_name=name,
        steps=4,
        learning_rate=2e-3,
        rank=4,
        alpha=4.0,
        batch_size=2,
        seed=1,
        sample_prompts=sample_prompts,
        caption_dropout=0.2,
    )
    return graph


def trainings() -> dict[str, Workflow]:
    adapters: dict[str, dict[str, Any]] = {
        "lora": {},
        "dora": {"adapter": "dora"},
        "loha": {"adapter": "loha"},
        "lokr": {"adapter": "lokr"},
        "rslora": {"use_rslora": True, "lora_plus_ratio": 4.0},
        "pissa": {"init": "pissa"},
        "text encoders": {"text_encoder_learning_rate": 1e-3, "text_encoder_2_learning_rate": 1e-3},
        "blocks": {"blocks": "mid_block, up_blocks.0", "block_ranks": "mid_block=2", "save_format": "peft"},
    }
    tokens = node("CaptionOptions", new_tokens="ohwx=cat", vectors_per_token=2)
    losses = [
        node("LossOptions", snr_gamma=5.0, noise_offset=0.05, loss="huber", timestep_sampling="logit_normal"),
        node("CaptionOptions", shuffle_tags=True, tag_separator=" "),
        node("OptimizerOptions", ema_decay=0.9),
    ]
    watch = node("WatchOptions", validate_every=2, keep_best="validation_loss", sample_every=2, sample_steps=2)
    return {
        **{name: training(name, [node("AdapterOptions", **settings)]) for name, settings in adapters.items()},
        "new tokens": training("new tokens", [tokens], trigger_word="ohwx"),
        "losses": training("losses", losses),
        "watched": training("watched", [watch], sample_prompts=PROMPT),
    }


# Generations

SAMPLERS = {
    "dpmpp_2m_sde": "exponential",
    "dpmpp_3m": "beta",
    "dpmpp_sde": "karras",
    "unipc": "normal",
    "euler": "normal",
    "euler_ancestral": "sgm_uniform",
    "heun": "karras",
    "ddim": "ddim_uniform",
    "ddpm": "normal",
    "pndm": "ddim_uniform",
    "lcm": "sgm_uniform",
    "tcd": "sgm_uniform",
}


def generation(more: Workflow, **changes: Any) -> Workflow:
    """One request; `more` are the nodes that it is linked to."""
    request = {
        "base": ["base", 0],
        "prompt": PROMPT,
        "negative_prompt": "",
        "seed": 5,
        "steps": 5,
        "guidance": 4.0,
        "width": WIDTH,
        "height": HEIGHT,
        "count": 1,
        "sampler": "dpmpp_2m",
        "scheduler": "karras",
        "cache": "use",
    }
    base = node("LoadSDXLBase", base=BASE, precision="fp32")
    return {"base": base, **more, "images": node("SDXLGenerateCached", **{**request, **changes})}


def picture() -> torch.Tensor:
    """Colours that run across the image, as ComfyUI's IMAGE."""
    across, down = torch.linspace(0, 1, WIDTH).expand(HEIGHT, WIDTH), torch.linspace(0, 1, HEIGHT)[:, None]
    return torch.stack([across, down.expand(HEIGHT, WIDTH), 1 - across], dim=-1)[None]


def left_half() -> torch.Tensor:
    """As ComfyUI's MASK."""
    mask = torch.zeros(1, HEIGHT, WIDTH)
    mask[:, :, : WIDTH // 2] = 1
    return mask


def lora_stack() -> Workflow:
    strengths = {"strength_model": 0.8, "strength_clip": 0.5, "enabled": True}
    return {
        "first": node("LoadLoRA", lora_name=STYLES[0], **strengths),
        "stack": node("LoadLoRA", lora_name=STYLES[1], lora_stack=["first", 0], blocks="mid_block=0.5", **strengths),
    }


def steered() -> Workflow:
    net = node(
        "AddControlNet", control_net=CONTROL_NET, image=picture(), strength=0.8, start_percent=0.0, end_percent=0.8
    )
    return {"net": net}


def generations() -> dict[str, Workflow]:
    plain: dict[str, dict[str, Any]] = {
        "two seeds": {"count": 2},
        "guidance off": {"guidance": 1.0},
        "negative prompt": {"negative_prompt": "blurry, green"},
        "image to image": {"image": picture(), "denoise": 0.6},
        "inpainting": {"image": picture(), "mask": left_half(), "denoise": 0.8},
        "inpainting from noise": {"image": picture(), "mask": left_half(), "count": 2, "batch_size": 2},
        "guidance interval": {"guidance_start": 0.2, "guidance_end": 0.7, "guidance_rescale": 0.7},
        "slices and a half batch": {"attention_slicing": True, "vae_slicing": True, "count": 3, "batch_size": 2},
        "second pass": {"hires_scale": 1.5, "hires_steps": 3},
        "micro-conditioning": {"original_width": 48, "crop_left": 32, "target_height": 128},
        "comfy syntax": {"prompt_syntax": "comfy", "prompt": "a (red:1.4) circle on a [navy] (background:0.7)"},
        "long prompt": {"long_prompts": "chunks", "prompt": " and ".join([PROMPT] * 12)},
        "batches and tiles": {"batch_size": 2, "count": 3, "vae_tiling": True, "guidance_rescale": 0.5},
    }
    start = {"image": picture(), "mask": left_half(), "denoise": 0.6}
    steering = {"controls": ["net", 0], "batch_size": 2, "count": 2}
    return {
        **{name: generation({}, **changes) for name, changes in plain.items()},
        **{name: generation({}, sampler=name, scheduler=schedule) for name, schedule in SAMPLERS.items()},
        **{
            f"{name} inpainting": generation({}, sampler=name, scheduler=schedule, **start)
            for name, schedule in SAMPLERS.items()
        },
        "LoRA stack": generation(lora_stack(), lora_stack=["stack", 0]),
        "ControlNet": generation(steered(), controls=["net", 0]),
        "ControlNet inpainting": generation(steered(), **steering, **start, guidance_end=0.5),
        "ControlNet second pass": generation(steered(), **steering, hires_scale=1.5, sampler="heun"),
    }


def write_control_net(folder: Path) -> None:
    """The way down of the base's UNet with random convolutions where an untrained ControlNet has zeros."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    net: Any = ControlNetModel.from_unet(UNet2DConditionModel.from_pretrained(ROOT / "assets/tiny-sdxl/unet"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if name.startswith("controlnet_"):
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    net.save_pretrained(folder)


# One tree


def jobs(steps: int | None, only: list[str]) -> dict[str, Workflow]:
    found = {"demo training": demo_training(steps), **trainings(), **generations()}
    if unknown := set(only) - set(found):
        raise SystemExit(f"unknown jobs {', '.join(sorted(unknown))}; known are {', '.join(found)}")
    return {name: graph for name, graph in found.items() if not only or name in only}


def run_jobs(folder: Path, wanted: dict[str, Workflow]) -> None:
    """Runs the jobs with the tree in the current folder. A folder for each job gets what it has written."""
    from tools import run_workflow  # the tree's own, which PYTHONPATH names

    if not Path(run_workflow.__file__).resolve().is_relative_to(Path.cwd().resolve()):
        raise RuntimeError(f"the tree in {Path.cwd()} runs the code of {run_workflow.__file__}")
    home = folder / "home"
    if any("net" in graph for graph in wanted.values()):
        write_control_net(home / "models/controlnet" / CONTROL_NET)
    for name, graph in wanted.items():
        outputs = run_workflow.run(graph, home)
        collect(graph, outputs, home, folder / name)


def collect(graph: Workflow, outputs: Outputs, home: Path, results: Path) -> None:
    results.mkdir(parents=True)
    for key, found in graph.items():
        if found["class_type"] == "TrainSDXLLoRA":
            copy_training(Path(outputs[key][1][0]).stem, home, results)
        if found["class_type"] == "SDXLGenerateCached":
            copy_images(json.loads(outputs[key][1][0]), home, results)


def copy_training(name: str, home: Path, results: Path) -> None:
    shutil.copy(home / f"loras/{name}.safetensors", results)
    shutil.copy(home / f"lora_runs/{name}/identity", results)
    for embedding in (home / "embeddings").glob(f"{name}-*"):
        shutil.copy(embedding, results)


def copy_images(facts: list[dict[str, Any]], home: Path, results: Path) -> None:
    """The PNGs by their number, so that a key that differs does not hide whether the pixels do."""
    for number, image in enumerate(facts):
        (entry,) = (home / "user/sdxl_lora/images").rglob(image["key"])
        shutil.copy(entry / "image.png", results / f"{number}.png")
    (results / "keys").write_text("\n".join(image["key"] for image in facts), encoding="utf-8")


# Both trees


def check_out(revision: str, folder: Path) -> Path:
    """The files of the revision, without touching the repository."""
    tree, archive = folder / "tree", folder / "tree.tar"
    subprocess.run(["git", "archive", "--output", str(archive), revision], cwd=ROOT, check=True)
    shutil.unpack_archive(archive, tree, filter="data")
    return tree


def run_tree(tree: Path, results: Path, options: list[str]) -> None:
    """-P: this file's own folder stays off the path, so that every import comes from the tree."""
    command = [sys.executable, "-P", str(Path(__file__).resolve()), "--jobs", str(results), *options]
    environment = {**os.environ, "PYTHONPATH": str(tree), "CUDA_VISIBLE_DEVICES": ""}
    code = subprocess.run(command, cwd=tree, env=environment, check=False).returncode
    if code:
        print(f"the jobs of {tree} ended with exit code {code}", file=sys.stderr)


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*"))}


def verdict(ours: dict[str, bytes], theirs: dict[str, bytes]) -> str:
    if not ours or not theirs:
        return "MISSING"
    other = [name for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)]
    return f"DIFFERENT: {', '.join(other)}" if other else "equal"


def compare(ours: Path, theirs: Path, names: Iterable[str]) -> bool:
    """Prints a row for each job. Whether all are equal."""
    equal = True
    print(f"{'job':<30}{'bytes here':>12}{'bytes there':>13}  result")
    for name in names:
        found = files_of(ours / name), files_of(theirs / name)
        sizes = [sum(map(len, files.values())) for files in found]
        result = verdict(*found)
        equal &= result == "equal"
        print(f"{name:<30}{sizes[0]:>12}{sizes[1]:>13}  {result}")
    return equal


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", nargs="?", default="HEAD", help="what to compare the working tree with")
    parser.add_argument("--steps", type=int, help="of the demo's training, where its own are too many")
    parser.add_argument("--only", nargs="+", default=[], metavar="JOB", help="some of the jobs")
    parser.add_argument("--jobs", type=Path, help=argparse.SUPPRESS)  # runs those of one tree
    arguments = parser.parse_args()
    wanted = jobs(arguments.steps, arguments.only)
    if arguments.jobs:
        run_jobs(arguments.jobs, wanted)
        return 0
    steps = ["--steps", str(arguments.steps)] if arguments.steps else []
    options = [*steps, *(["--only", *arguments.only] if arguments.only else [])]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for tree, results in ((ROOT, "ours"), (check_out(arguments.revision, folder), "theirs")):
            run_tree(tree, folder / results, options)
        return 0 if compare(folder / "ours", folder / "theirs", wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
