"""Damaged and hostile files of every kind: each is read right, or refused in one sentence, before anything is written.

A tenth of the 10,000 variants runs in `make test`, all of them in `make accept`. The variants are the same each time.
"""

from __future__ import annotations

import io
import json
import shutil
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from sdxl_lora_core.cache.image_cache import ImageCache
from sdxl_lora_core.cli.run_file import read_run
from sdxl_lora_core.control.control_net import open_control_net
from sdxl_lora_core.dataset.caption_dataset import load_caption_dataset
from sdxl_lora_core.dataset.config import DatasetConfig
from sdxl_lora_core.dataset.report import contact_sheet, describe
from sdxl_lora_core.files import check_name, require_file_names, safe_path
from sdxl_lora_core.generation.config import GenerateConfig
from sdxl_lora_core.images.decode import decode_mask, decode_with_alpha
from sdxl_lora_core.lora.describe import describe_lora
from sdxl_lora_core.sdxl.base import SDXLBase, load_part, open_base
from sdxl_lora_core.sdxl.vae_override import with_vae
from sdxl_lora_core.settings import from_mapping
from sdxl_lora_core.text.embedding_files import open_embedding, write_embedding
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.run.checkpoints import Checkpoints
from tests.fuzz.mutations import TEXTS, bytes_of, headers_of, json_bytes, json_of
from tests.micro.controls import random_net, save_single
from tests.micro.images import draw, write_lora
from tests.micro.images import settings as request
from tests.micro.runs import SMALL, Trained
from tools.run_workflow import load_pack, run

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 2**30  # bytes beside what the process has
Variants = st.SearchStrategy[Any]
Read = Callable[[Any], object]


@dataclass(frozen=True)
class World:
    """Valid files of each kind, and a folder for their variants."""

    folder: Path
    base: SDXLBase
    base_folder: Path
    checkpoint: Path
    trained: Trained

    def put(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path


# What reads each kind of file


def dataset(world: World, name: str, content: bytes) -> None:
    """The file in a folder of two pictures, of which `b.png` has a caption."""
    folder = world.folder / "dataset"
    shutil.rmtree(folder, ignore_errors=True)
    for picture in ("a.png", "b.png"):
        world.put(f"dataset/{picture}", png())
    world.put("dataset/b.txt", b"a plain caption")
    world.put(f"dataset/{name}", content)
    loaded = load_caption_dataset(folder, DatasetConfig(resolution=64))
    describe(loaded)
    contact_sheet(loaded)
    used = {entry.image.name: entry for entry in loaded.entries}
    named = {Path(problem.file).name for problem in loaded.problems}
    assert named | {*used} >= {"b.png", "a.jpeg" if name == "a.jpeg" else "a.png"}
    assert all(unicodedata.category(letter) not in ("Cc", "Cs") for entry in loaded.entries for letter in entry.caption)


def png(seed: int = 0, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    texts = PngImagePlugin.PngInfo()
    texts.add_text("parameters", "a red circle")
    Image.fromarray(pixels).save(file, kind, **({"pnginfo": texts} if kind == "PNG" else {"exif": Image.Exif()}))
    return file.getvalue()


def captions(world: World) -> tuple[Variants, Read]:
    samples = ["a red circle, on navy", "ein Kreis\r\nzwei", "1girl, (blue:1.2), \u00e9t\u00e9 \U0001f600"]
    encoded = [text.encode(encoding) for text in samples for encoding in ("utf-8", "utf-16", "utf-8-sig")]
    variants = st.sampled_from(encoded).flatmap(bytes_of)
    return variants, lambda content: dataset(world, "a.txt", content)


def csv_files(world: World) -> tuple[Variants, Read]:
    variants = bytes_of(b'file_name,caption\na.png,"one, two"\nb.png,three\n')
    return variants, lambda content: dataset(world, "metadata.csv", content)


def jsonl_files(world: World) -> tuple[Variants, Read]:
    rows: Any = [{"file_name": "a.png", "caption": "one"}, {"file_name": "b.png", "text": ["two", "three"]}]
    lines = json_of(rows).map(lambda rows: b"\n".join(map(json_bytes, rows if isinstance(rows, list) else [rows])))
    variants = lines | bytes_of(b"\n".join(map(json_bytes, rows)))
    return variants, lambda content: dataset(world, "metadata.jsonl", content)


def pictures(kind: str) -> Callable[[World], tuple[Variants, Read]]:
    def made(world: World) -> tuple[Variants, Read]:
        def read(content: bytes) -> None:
            name = f"a.{kind.lower()}"
            path = world.put(f"single/{name}", content)
            for decode in (decode_with_alpha, decode_mask):
                decode(path)
            dataset(world, name, content)

        return bytes_of(png(kind=kind)), read

    return made


def loras(world: World) -> tuple[Variants, Read]:
    headers, rest = headers_of(write_lora(world.folder / "sample.safetensors", world.base, 1).path.read_bytes())
    return headers, lambda header: describe_lora(world.put("lora.safetensors", header + rest))


def trained_loras(world: World) -> tuple[Variants, Read]:
    """With all metadata that a training writes; the values of some are JSON themselves."""
    sample = world.trained().lora_path.read_bytes()
    start = 8 + int.from_bytes(sample[:8], "little")
    header = json.loads(sample[8:start])
    metadata = header.pop("__metadata__")
    inner = {name: json.loads(text) for name, text in metadata.items() if text.startswith(("{", "["))}

    def file(changed: Any) -> bytes:
        texts = {name: json.dumps(value) for name, value in changed.items()} if isinstance(changed, dict) else {}
        whole = json_bytes({"__metadata__": {**metadata, **texts}, **header})
        return len(whole).to_bytes(8, "little") + whole + sample[start:]

    return json_of(inner).map(file), lambda content: describe_lora(world.put("trained.safetensors", content))


def peft_settings(world: World) -> tuple[Variants, Read]:
    write_lora(world.folder / "peft/adapter_model.safetensors", world.base, 1)
    sample = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_q": 2}, "rank_pattern": {"to_v": 3}, "use_rslora": True}

    def read(content: bytes) -> None:
        world.put("peft/adapter_config.json", content)
        describe_lora(world.folder / "peft/adapter_model.safetensors")

    return json_of(sample).map(json_bytes) | bytes_of(json_bytes(sample)), read


def checkpoints_of_one_file(world: World) -> tuple[Variants, Read]:
    headers, rest = headers_of(world.checkpoint.read_bytes())

    def read(header: bytes) -> None:
        base = open_base(world.put("base.safetensors", header + rest), "fp32", configs=world.base_folder)
        load_part(base, "vae", torch.float32)

    return headers, read


def model_folders(world: World) -> tuple[Variants, Read]:
    folder = world.folder / "base"
    shutil.copytree(world.base_folder, folder)
    files = {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*config.json"))}

    def variant(name: Path) -> Variants:
        return st.tuples(st.just(name), json_of(json.loads(files[name])).map(json_bytes) | bytes_of(files[name]))

    def read(changed: tuple[Path, bytes]) -> None:
        name, content = changed
        (folder / name).write_bytes(content)
        try:
            base = open_base(folder, "fp32")
            if name.parent.name in ("unet", "vae", "text_encoder", "text_encoder_2"):
                load_part(base, name.parent.name, torch.float32)  # type: ignore[arg-type]
        finally:
            (folder / name).write_bytes(files[name])

    return st.sampled_from(sorted(files)).flatmap(variant), read


def vaes(world: World) -> tuple[Variants, Read]:
    headers, rest = headers_of((world.base_folder / "vae/diffusion_pytorch_model.safetensors").read_bytes())
    return headers, lambda header: with_vae(world.base, world.put("vae.safetensors", header + rest))


def control_nets(world: World) -> tuple[Variants, Read]:
    headers, rest = headers_of(save_single(world.folder / "net.safetensors", random_net(world.base, 1)).read_bytes())
    return headers, lambda header: open_control_net(world.put("net.safetensors", header + rest))


def embeddings(world: World) -> tuple[Variants, Read]:
    path = world.folder / "word.safetensors"
    write_embedding(path, {"text_encoder": torch.ones(2, 8), "text_encoder_2": torch.ones(2, 12)})
    headers, rest = headers_of(path.read_bytes())
    return headers, lambda header: open_embedding("word", world.put("word.safetensors", header + rest), None).vectors()


def run_files(world: World) -> tuple[Variants, Read]:
    world.put("pictures/a.png", png())
    world.put("pictures/a.txt", b"a picture")
    sample = {
        "base": {"path": str(world.base_folder), "precision": "fp32"},
        "datasets": [{"folder": str(world.folder / "pictures"), "resolution": 64}],
        "train": {"lora_name": "one", "steps": 5, "learning_rate": 0.001, "sample_prompts": ["a", "b"]},
    }
    text = yaml.safe_dump(sample).encode()
    dumped = json_of(sample).map(
        lambda document: yaml.safe_dump(document, allow_unicode=True).encode("utf-8", "replace")
    )
    return dumped | bytes_of(text), lambda content: read_run(world.put("run.yaml", content), None)


def settings_of(config: type) -> Callable[[World], tuple[Variants, Read]]:
    def made(world: World) -> tuple[Variants, Read]:
        sample = json.loads(json.dumps({**vars_of(config)}))
        return json_of(sample), lambda changed: from_mapping(config, changed, "settings")

    return made


def vars_of(config: type) -> dict[str, Any]:
    given = {"prompt": "a"} if config is GenerateConfig else {}
    return {**vars(config(**given))}


def stacks(world: World) -> tuple[Variants, Read]:
    rows = [["a.safetensors", 1.0, 0.5], {"name": "b", "strength": 1.0, "on": True}, {"lora": "c", "weight": 2}]
    read_stack = load_pack().nodes.wires.read_stack
    return json_of(rows), read_stack


def prompts(world: World) -> tuple[Variants, Read]:
    sample = b"a (red:1.2) [circle] embedding:word, ((deep)) \\(plain\\) 1e9"
    text = bytes_of(sample).map(lambda data: data.decode("utf-8", "surrogateescape")) | st.sampled_from(TEXTS)

    def read(prompt: str) -> None:
        draw(world.base, request(prompt=prompt, prompt_syntax="comfy", steps=1, guidance=1.0))

    return text, read


def workflows(world: World) -> tuple[Variants, Read]:
    """The values of inputs; that links and classes fit is checked by ComfyUI."""
    home = world.folder / "home"
    (home / "models/loras").mkdir(parents=True)
    write_lora(home / "models/loras/one.safetensors", world.base, 1)
    shutil.copytree(world.base_folder, home / "models/diffusers/micro")
    sample = {
        "LoadSDXLBase": {"base": "micro", "precision": "fp32", "prediction": "auto", "vae": "of the base"},
        "LoadLoRA": {"lora_name": "one.safetensors", "strength_model": 1.0, "strength_clip": 1.0, "enabled": True},
        "SDXLGenerateCached": {
            "prompt": "a", "negative_prompt": "", "seed": 1, "steps": 1, "guidance": 2.0, "width": 64, "height": 64,
            "count": 1, "sampler": "euler", "scheduler": "karras", "cache": "off", "prompt_syntax": "comfy",
        },
    }  # fmt: skip

    def read(changed: Any) -> None:
        nodes = {name: {"class_type": name, "inputs": changed.get(name)} for name in sample}
        nodes["SDXLGenerateCached"]["inputs"] |= {"base": ["LoadSDXLBase", 0], "lora_stack": ["LoadLoRA", 0]}
        run(nodes, home)

    whole = json_of(sample).filter(lambda changed: all(isinstance(changed.get(name), dict) for name in sample))
    return whole, read


def names(world: World) -> tuple[Variants, Read]:
    def read(name: str) -> None:
        check_name("lora_name", name, subfolders=True)
        require_file_names(world.folder / "names", {"lora_name": name})
        path = safe_path(world.folder / "names", f"{name}.safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        assert path.resolve().is_relative_to((world.folder / "names").resolve())

    texts = bytes_of(b"styles/my lora_1").map(lambda data: data.decode("utf-8", "surrogateescape"))
    return texts | st.sampled_from(TEXTS) | st.text(max_size=300), read


def cached_images(world: World) -> tuple[Variants, Read]:
    """A damaged entry is one that is not there: an image from it is the one that was stored."""
    cache, key = ImageCache(world.folder / "images"), "ab" * 32
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    cache.store(key, pixels, {"settings": {}}, {"prompt": "a"}, torch.ones(4, 4, 4))
    files = {path: path.read_bytes() for path in cache.root.rglob("*") if path.is_file() and key[:8] in str(path)}

    def read(changed: tuple[Path, bytes]) -> None:
        path, content = changed
        path.write_bytes(content)
        found, latents = cache.load(key), cache.load_latents(key)
        path.write_bytes(files[path])
        assert found is None or np.array_equal(found, pixels)
        assert latents is None or torch.equal(latents, torch.ones(4, 4, 4))

    return st.sampled_from(sorted(files)).flatmap(lambda path: st.tuples(st.just(path), bytes_of(files[path]))), read


def run_folders(world: World) -> tuple[Variants, Read]:
    """A damaged checkpoint is skipped; one that is read is the one that was written."""
    result = world.trained(SMALL)
    source = next((result.lora_path.parents[1] / "runs").glob("*/checkpoints/step-*"))
    folder = world.folder / "checkpoints" / source.name
    shutil.copytree(source, folder)
    state = json.loads((folder / "state.json").read_text())
    checkpoints = Checkpoints(folder.parent, state["fingerprint"])
    whole = checkpoints.newest()
    files = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def read(changed: tuple[Path, bytes]) -> None:
        path, content = changed
        path.write_bytes(content)
        found = checkpoints.newest()
        path.write_bytes(files[path])
        assert found is None or found == whole

    return st.sampled_from(sorted(files)).flatmap(lambda path: st.tuples(st.just(path), bytes_of(files[path]))), read


KINDS: dict[str, tuple[int, Callable[[World], tuple[Variants, Read]]]] = {
    "captions": (1000, captions),
    "CSV": (800, csv_files),
    "JSONL": (800, jsonl_files),
    "PNG": (800, pictures("PNG")),
    "JPEG": (800, pictures("JPEG")),
    "LoRA": (800, loras),
    "metadata of a LoRA": (600, trained_loras),
    "adapter_config.json": (400, peft_settings),
    "checkpoint": (300, checkpoints_of_one_file),
    "model folder": (300, model_folders),
    "VAE": (300, vaes),
    "ControlNet": (300, control_nets),
    "embedding": (300, embeddings),
    "run.yaml": (500, run_files),
    "settings of a training": (300, settings_of(TrainConfig)),
    "settings of an image": (300, settings_of(GenerateConfig)),
    "settings of a dataset": (100, settings_of(DatasetConfig)),
    "LORA_STACK": (200, stacks),
    "prompt": (200, prompts),
    "workflow": (200, workflows),
    "name": (300, names),
    "image cache": (300, cached_images),
    "run folder": (100, run_folders),
}


def test_there_are_ten_thousand() -> None:
    assert sum(share for share, _ in KINDS.values()) == 10_000


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("divisor", [10, pytest.param(1, marks=pytest.mark.accept)], ids=["a tenth", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_is_read_or_refused(
    kind: str,
    divisor: int,
    micro_sdxl: Path,
    micro_base: SDXLBase,
    micro_checkpoint: Path,
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    world = World(tmp_path / "in" / "world", micro_base, micro_sdxl, micro_checkpoint, trained)
    (world.folder / "peft").mkdir(parents=True)
    share, make = KINDS[kind]
    variants, read = make(world)

    @settings(
        max_examples=share // divisor,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(variants)
    def attempt(variant: Any) -> None:
        try:
            read(variant)
        except (ValueError, OSError) as error:
            require_sentence(error)

    with limited_memory():
        attempt()
    outside = {path.name for folder in (tmp_path, tmp_path / "in") for path in folder.iterdir()}
    assert outside == {"in", "world"}
    assert not Path("/etc/passwd.safetensors").exists()


def require_sentence(error: Exception) -> None:
    """It is one of ours, raised where the cause is known, and says it in a line."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    told = f"{type(error).__name__}: {str(error)!r} from {place.filename}:{place.lineno}"
    assert type(error) in (ValueError, FileNotFoundError), told
    assert Path(place.filename).is_relative_to(ROOT), told
    assert 15 < len(str(error)) < 1500 and "\n" not in str(error), told


@contextmanager
def limited_memory() -> Iterator[None]:
    """Allocations of over a gigabyte fail, where the system can limit them."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_DATA)
    # As the kernel counts it, with what allocators hold in reserve. A limit below that would end the process.
    reserved = getattr(psutil.Process().memory_info(), "data", 0)
    resource.setrlimit(resource.RLIMIT_DATA, (reserved + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
