"""The commands that generate and evaluate: `sdxl-lora generate`, `score`, `compare` and `report`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..cache.folders import CacheFolders
from ..dataset.audit import audit
from ..dataset.audit_chart import audit_chart
from ..dataset.caption_dataset import CaptionEntry, load_caption_dataset
from ..dataset.config import DatasetConfig
from ..evaluation.clip_score import score_images, with_recalls
from ..evaluation.comparison import ComparisonJob, Metric, compare
from ..evaluation.comparison_report import sentences
from ..evaluation.config import ScoreConfig
from ..evaluation.dataset_page import save_audit
from ..evaluation.metrics import ClipAdherence, ReferenceSimilarity
from ..evaluation.references import find_references, pictures
from ..evaluation.saving import claimed_folder, save_comparison
from ..evaluation.similarity import Features, compare_images
from ..evaluation.tag_recall import Tagger
from ..evaluation.variants import LoRAFiles, make_variants, parse_axis
from ..files import write_atomic
from ..generation.config import GenerateConfig
from ..generation.generate import generate
from ..generation.job import GenerationContext, GenerationJob
from ..generation.passes import GeneratedImage
from ..images.png import png_info
from ..lora.stack import LoRARef
from ..runtime.device import default_device
from ..runtime.loaded_parts import LoadedParts
from ..sdxl.base import open_base, open_sd15_base, require_vae
from ..settings import from_mapping
from ..text.caption_length import caption_length
from .bar import Bar
from .settings_list import read_changes


def add_commands(commands: Any, home: Path) -> None:
    """`home` is the default of --home, the folder of the caches."""
    _add_generate(commands, home)
    _add_compare(commands, home)
    _add_score(commands)
    _add_report(commands)


def _add_generate(commands: Any, home: Path) -> None:
    command = commands.add_parser("generate", help="generate images with a base and LoRAs, through the image cache")
    _add_generation(command, home)
    command.add_argument("--save-as", default="generated", help="the folder in --output/images (%(default)s)")
    command.set_defaults(run=_generate)


def _add_compare(commands: Any, home: Path) -> None:
    command = commands.add_parser("compare", help="compare LoRAs, checkpoints, strengths or settings, with intervals")
    _add_generation(command, home)
    command.add_argument("--columns", default="", help="what changes from column to column: 'strength: 0.5, 1'")
    command.add_argument("--rows", default="", help="what changes from row to row: 'steps: 10, 25'")
    command.add_argument("--clip-model", type=Path, help="the folder of a CLIP or SigLIP model: scores the prompts")
    command.add_argument("--image-model", type=Path, help="the folder of an image model, for --references")
    command.add_argument("--references", type=Path, help="a folder of captioned images that were not trained on")
    command.add_argument("--save-as", default="comparison", help="the folder in --output/comparisons (%(default)s)")
    command.set_defaults(run=_compare)


def _add_score(commands: Any) -> None:
    command = commands.add_parser("score", help="score a folder of captioned images")
    command.add_argument("folder", type=Path, help="images with captions, as for training")
    command.add_argument("--clip-model", type=Path, required=True, help="the folder of a CLIP or SigLIP model")
    command.add_argument("--prompt", help="a text for all images, instead of their captions")
    command.add_argument("--tagger", type=Path, help="the folder of an image classifier that knows the tags")
    command.add_argument("--image-model", type=Path, help="the folder of an image model, for --references")
    command.add_argument("--references", type=Path, help="a folder of captioned images to compare with")
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the score")
    command.add_argument("--device", type=torch.device, default=default_device())
    command.set_defaults(run=_score)


def _add_report(commands: Any) -> None:
    command = commands.add_parser("report", help="check a dataset: duplicates, captions, tags")
    command.add_argument("folder", type=Path)
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the dataset")
    command.add_argument("--output", type=Path, default=Path("output"), help="gets datasets/")
    command.add_argument("--save-as", default="dataset", help="the folder in --output/datasets (%(default)s)")
    command.set_defaults(run=_report)


def _add_generation(command: argparse.ArgumentParser, home: Path) -> None:
    command.add_argument("base", type=Path, help="a checkpoint or a diffusers folder")
    command.add_argument("--prompt", action="append", required=True, help="repeat it for several prompts")
    command.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:STRENGTH[:TEXT]]", help="repeat it for a stack"
    )
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting, such as steps=20")
    command.add_argument("--sd15", action="store_true", help="the base is Stable Diffusion 1.5")
    command.add_argument("--precision", default="auto", help="of the base: auto, fp32, bf16 or fp16")
    command.add_argument("--output", type=Path, default=Path("output"))
    command.add_argument("--home", type=Path, default=home, help="the folder of the caches (%(default)s)")
    command.add_argument("--device", type=torch.device, default=default_device())


def _generate(options: argparse.Namespace) -> None:
    with Bar() as bar:
        images = generate(_job(options), _context(options, bar))
    folder = claimed_folder(options.output / "images", options.save_as)
    for number, image in enumerate(images):
        path = folder / f"{number:05d}.png"
        write_atomic(path, _png(image))
        print(f"{path}  seed {image.seed}{', from the cache' if image.hit else ''}")


def _compare(options: argparse.Namespace) -> None:
    job = _job(options)
    files = LoRAFiles(lambda name, model, clip: LoRARef(Path(name), name, model, clip), _checkpoints)
    variants = make_variants(job.loras, parse_axis(options.columns), parse_axis(options.rows), files)
    metrics: list[Metric] = []
    if options.clip_model:
        metrics.append(ClipAdherence(options.clip_model, options.device))
    if options.image_model and options.references:
        held_out = _images_of(options.references)
        metrics.append(ReferenceSimilarity(Features(options.image_model, options.device), held_out))
    with Bar() as bar:
        found = compare(ComparisonJob(job.base, job.config, variants, tuple(metrics)), _context(options, bar))
    saved = save_comparison(found, options.output / "comparisons", options.save_as)
    print("\n".join([*sentences(found), str(saved.page)]))


def _score(options: argparse.Namespace) -> None:
    config = from_mapping(ScoreConfig, read_changes(options.set))
    entries = _entries(options.folder, captioned=options.prompt is None)
    images = pictures(entries)
    prompts = [options.prompt] if options.prompt is not None else [entry.caption for entry in entries]
    report = score_images(images, prompts, options.clip_model, options.device)
    if options.tagger:
        report = with_recalls(report, images, Tagger(options.tagger, config.tag_threshold, options.device))
    document: dict[str, Any] = json.loads(report.to_json()) | {"files": [entry.image.name for entry in entries]}
    if options.image_model:
        references = _images_of(options.references) if options.references else None
        found = find_references(references, None)
        document["similarity"] = compare_images(images, Features(options.image_model, options.device), found).as_json(
            ()
        )
    print(json.dumps(document, ensure_ascii=False, indent=1))


def _report(options: argparse.Namespace) -> None:
    dataset = load_caption_dataset(options.folder, from_mapping(DatasetConfig, read_changes(options.set)))
    found = audit(dataset, caption_length)
    page = save_audit(found, audit_chart(found), options.output / "datasets", options.save_as)
    print("\n".join([*found.sentences(), str(page)]))


def _job(options: argparse.Namespace) -> GenerationJob:
    changes = {"prompt_per_line": True, **read_changes(options.set), "prompt": "\n".join(options.prompt)}
    config = from_mapping(GenerateConfig, changes)
    opened = open_sd15_base if options.sd15 else open_base
    base = opened(options.base, precision=options.precision, hash_memo=CacheFolders(options.home).hashes)
    require_vae(base)
    return GenerationJob(base, config, [_lora(text) for text in options.lora])


def _context(options: argparse.Namespace, bar: Bar) -> GenerationContext:
    return GenerationContext(
        LoadedParts(options.device),
        CacheFolders(options.home),
        graph={},  # so that a PNG says how it was made
        on_step=lambda done, total: bar("generating", done, total),
    )


def _png(image: GeneratedImage) -> Callable[[Path], object]:
    return lambda path: Image.fromarray(image.pixels).save(path, "PNG", pnginfo=png_info(image.texts))


def _lora(text: str) -> LoRARef:
    """`FILE`, `FILE:0.8` or `FILE:0.8:0.5`; the colon of a drive letter is part of the file."""
    parts = text.rsplit(":", 2)
    strengths: list[float] = []
    while len(parts) > 1 and _is_number(parts[-1]):
        strengths.insert(0, float(parts.pop()))
    path = Path(":".join(parts))
    model, clip = (*strengths, *strengths[-1:], 1.0, 1.0)[:2]
    return LoRARef(path, str(path), model, clip)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _checkpoints(name: str) -> Mapping[int, str]:
    """The LoRAs of earlier steps that a run kept in the folder beside a LoRA."""
    folder = Path(name).with_suffix("")
    return {int(path.stem.removeprefix("step-")): str(path) for path in folder.glob("step-*.safetensors")}


def _images_of(folder: Path) -> Sequence[np.ndarray]:
    return pictures(_entries(folder, captioned=False))


def _entries(folder: Path, captioned: bool) -> tuple[CaptionEntry, ...]:
    """The images of a folder; those without a caption only if none is needed."""
    dataset = load_caption_dataset(folder, DatasetConfig(trigger_word="" if captioned else "image"))
    return dataset.entries + dataset.regularisation
