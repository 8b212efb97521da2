"""A ComfyUI that trains, generates, and samples with its own nodes in turn: the server's memory after each round.

    python -m benchmarks.memory_manners --comfyui ~/ComfyUI
    python -m benchmarks.memory_manners --comfyui ~/ComfyUI --size full --work DIR      (writes 14 GB into DIR once)

`micro` is the bundled base and a model of ComfyUI's classes of 6 MB. `full` is a random SDXL in one bf16 file that both
sides load: two training steps, one step of our sampler and one of KSampler a round, at 256 x 256.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.full_size import write_pictures, write_random_base
from sdxl_lora_core.lora.config import SaveBaseConfig
from sdxl_lora_core.lora.merged_base import save_merged_base
from sdxl_lora_core.sdxl.base import open_base
from tests.comfy.conftest import ROOT, Server, python_of, started

Graph = dict[str, dict[str, Any]]
BUNDLED = "tiny-sdxl (bundled)"
SMALL_CORE = ROOT / "tests/comfy/small_core"
CHECKPOINT = "random.safetensors"
BF16 = ("--bf16-unet", "--bf16-text-enc")  # on the CPU ComfyUI would take fp32, twice the memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--size", choices=("micro", "full"), default="micro")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    full = args.size == "full"
    checkpoint = write_checkpoint(args.work) if full else None
    comfyui = args.comfyui.expanduser()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        prepare(base, 256 if full else 64, checkpoint)
        with started(comfyui, python_of(comfyui), base, *(BF16 if full else ())) as server:
            print(f"at the start: {megabytes(resident(server))}", flush=True)
            began = time.monotonic()
            for number, used in enumerate(rounds(server, full_round if full else micro_round, args.rounds), 1):
                print(f"round {number}: {megabytes(used)}, {time.monotonic() - began:.0f} s", flush=True)
            print(f"after Unload models: {megabytes(unloaded(server))}")


def rounds(server: Server, round_of: Callable[[int], list[Graph]], count: int) -> Iterator[int]:
    """Runs the graphs of each round, one after the other. Yields the bytes that the server then has in memory."""
    for number in range(count):
        for graph in round_of(number):
            server.run(graph, seconds=1800)
        yield resident(server)


def unloaded(server: Server) -> int:
    """The bytes that the server has in memory after "Unload models" and "Free model and node cache"."""
    server.post("/free", {"unload_models": True, "free_memory": True})
    for _ in range(2):  # ComfyUI may take the first prompt before it unloads
        server.run({"cache": node("SDXLImageCache", action="show", limit_gb=0.0)})
    return resident(server)


def resident(server: Server) -> int:
    """Without the pages of mapped files, which the system takes away when it likes."""
    memory = psutil.Process(server.pid).memory_info()
    return memory.rss - memory.shared


def micro_round(number: int) -> list[Graph]:
    settings = Settings(BUNDLED, side=64, steps=3, precision="fp32")
    return [trained(settings, number), generated(settings, number), small_core(number, number)]


def small_core(model: int, number: int) -> Graph:
    """ComfyUI's sampler with its own small model."""
    core = {"load": node("SmallCoreSDXL", seed=model)}
    return core | sampled(64, 3, number, [["load", 1], ["load", 1]])


def full_round(number: int) -> list[Graph]:
    settings = Settings(CHECKPOINT, side=256, steps=1, precision="bf16")
    core = {"load": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)}
    core |= {name: node("CLIPTextEncode", text=name, clip=["load", 1]) for name in ("a star", "blurry")}
    core |= sampled(256, 1, number, [["a star", 0], ["blurry", 0]])
    return [trained(settings, number), generated(settings, number), core]


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


@dataclass(frozen=True)
class Settings:
    base: str
    side: int
    steps: int  # of the sampler
    precision: str

    def load(self) -> Graph:
        return {"base": node("LoadSDXLBase", base=self.base, precision=self.precision)}


def trained(settings: Settings, number: int) -> Graph:
    dataset = node(
        "LoadCaptionDataset", folder="pictures", trigger_word="", resolution=settings.side, validation_percent=0
    )
    run = {"lora_name": f"round_{number}", "steps": 2, "learning_rate": 1e-4, "rank": 4, "alpha": 4.0}
    run |= {"batch_size": 1, "seed": number, "sample_prompts": "", "precision": settings.precision}
    train = node("TrainSDXLLoRA", base=["base", 0], dataset=["dataset", 0], **run)
    return {**settings.load(), "dataset": dataset, "train": train}


def generated(settings: Settings, number: int) -> Graph:
    """With the LoRA of the same round, so that the weights that are held are changed each time."""
    strengths = {"strength_model": 1.0, "strength_clip": 1.0, "enabled": True}
    image = {"prompt": "a star", "negative_prompt": "", "seed": number, "steps": settings.steps, "guidance": 5.0}
    image |= {"width": settings.side, "height": settings.side, "count": 1, "cache": "use"}
    image |= {"sampler": "dpmpp_2m", "scheduler": "karras", "lora_stack": ["lora", 0]}
    lora = node("LoadLoRA", lora_name=f"round_{number}.safetensors", **strengths)
    return {**settings.load(), "lora": lora, "image": node("SDXLGenerateCached", base=["base", 0], **image)}


def sampled(side: int, steps: int, number: int, prompts: list[list[Any]]) -> Graph:
    """ComfyUI's sampler on the MODEL of the node `load`, with links to the wanted and the unwanted prompt."""
    solver = {"seed": number, "steps": steps, "cfg": 5.0, "denoise": 1.0}
    solver |= {"sampler_name": "dpmpp_2m", "scheduler": "karras", "model": ["load", 0], "latent_image": ["empty", 0]}
    return {
        "empty": node("EmptyLatentImage", width=side, height=side, batch_size=1),
        "sample": node("KSampler", positive=prompts[0], negative=prompts[1], **solver),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix="latents/core"),
    }


def prepare(base: Path, side: int, checkpoint: Path | None = None) -> None:
    """Fills the base directory of a ComfyUI with what the rounds need."""
    shutil.copytree(SMALL_CORE, base / "custom_nodes/small_core")
    write_pictures(base / "input/pictures", side)
    if checkpoint:
        (base / "models/checkpoints").mkdir(parents=True)
        (base / "models/checkpoints" / CHECKPOINT).symlink_to(checkpoint)


def write_checkpoint(work: Path) -> Path:
    """A random SDXL as one file, written once."""
    folder, made = work.absolute() / "random-sdxl", work.absolute() / "checkpoints" / CHECKPOINT
    if not (folder / "model_index.json").exists():
        write_random_base(folder)
    if not made.exists():
        config = SaveBaseConfig(base_name=made.stem, layout="single_file", precision="bf16")
        save_merged_base(open_base(folder), (), config, made.parent, lambda name: False)
    return made


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


if __name__ == "__main__":
    main()
