"""A random SDXL of a few channels, for tests that need a model and no meaning."""

from __future__ import annotations

import gc
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdxl_lora_core.cache.folders import CacheFolders
from sdxl_lora_core.sdxl.base import CONFIGS, SDXLBase, open_base
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.monitor import journal
from sdxl_lora_core.training.monitor.charts import plot_losses
from sdxl_lora_core.training.optim import run_plan
from sdxl_lora_core.training.optim.memory_measure import MeasuredRun
from sdxl_lora_core.training.run.runs import RunFolders
from sdxl_lora_core.training.train import TrainResult
from tests.micro.published import bare, published_openclip, published_unet, published_vae
from tests.micro.runs import SMALL, Train, Trained, load, train_on


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests that train as slow. The longest file comes first, so that no process waits for it at the end."""
    for item in items:
        if isinstance(item, pytest.Function) and {"run", "trained"} & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.path.name != "test_standin.py")


class NothingTaken:
    """Says that a run takes no memory."""

    blocks = 4

    def __init__(self, *_: object) -> None:
        pass

    def resting(self, weights: object, offloaded: int) -> int:
        return 0

    def step(self, checkpointing: object, images: int) -> int:
        return 0


# SDXL in every respect but size. No two widths that a mistake could swap are equal.
MICRO_UNET: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (8, 16, 16),
    "norm_num_groups": 4,
    "attention_head_dim": (1, 2, 2),
    "transformer_layers_per_block": (1, 1, 2),
    "cross_attention_dim": 20,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16 + 6 * 8,
}
MICRO_VAE: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (8, 8, 16, 16),
    "norm_num_groups": 4,
}
MICRO_TEXT: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "projection_dim": 8,
}
MICRO_TEXT_2: dict[str, Any] = {
    "hidden_size": 12,
    "intermediate_size": 48,
    "num_attention_heads": 3,
    "num_hidden_layers": 4,
    "projection_dim": 16,
}


def sdxl_config(config_class: Any, part: str, sizes: dict[str, Any]) -> dict[str, Any]:
    return {**config_class.load_config(str(CONFIGS), subfolder=part, local_files_only=True), **sizes}


def write_micro_sdxl(folder: Path) -> None:
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    text = CLIPTextConfig.from_pretrained(CONFIGS, subfolder="text_encoder", **MICRO_TEXT)
    text_2 = CLIPTextConfig.from_pretrained(CONFIGS, subfolder="text_encoder_2", **MICRO_TEXT_2)
    StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_config(sdxl_config(AutoencoderKL, "vae", MICRO_VAE)),
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text_2),
        tokenizer=CLIPTokenizer.from_pretrained(CONFIGS / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(CONFIGS / "tokenizer_2"),
        unet=UNet2DConditionModel.from_config(sdxl_config(UNet2DConditionModel, "unet", MICRO_UNET)),
        scheduler=EulerDiscreteScheduler.from_pretrained(CONFIGS, subfolder="scheduler"),
        add_watermarker=False,
    ).save_pretrained(folder)
    for tokenizer in ("tokenizer", "tokenizer_2"):  # as published, instead of transformers' one-file form of 4 MB each
        shutil.rmtree(folder / tokenizer)
        shutil.copytree(CONFIGS / tokenizer, folder / tokenizer)


@pytest.fixture(scope="session")
def micro_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of 8 MB, nearly all of it CLIP's vocabulary. Read only: copy it before changing it."""
    folder = tmp_path_factory.mktemp("micro") / "micro-sdxl"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        write_micro_sdxl(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def quick_collection() -> None:
    """Training frees its memory with gc.collect, which would look at every library's objects each time."""
    import diffusers  # noqa: F401
    import peft  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def fixed_plan() -> Iterator[None]:
    """A training keeps nothing, says the memory plan, which would count for 3 s for each new shape. See `real_plan`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_plan, "MeasuredRun", NothingTaken)
        yield


@pytest.fixture
def real_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory plan counts, as it does outside the tests."""
    monkeypatch.setattr(run_plan, "MeasuredRun", MeasuredRun)


@pytest.fixture(scope="session", autouse=True)
def blank_charts() -> Iterator[None]:
    """A training's chart is blank, where matplotlib would take a third of a small run to draw it. See `real_charts`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "plot_losses", lambda path, *_: Image.new("RGB", (1, 1)).save(path, format="PNG"))
        yield


@pytest.fixture
def real_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts are drawn, as they are outside the tests."""
    monkeypatch.setattr(journal, "plot_losses", plot_losses)


@pytest.fixture(scope="session")
def micro_base(micro_sdxl: Path) -> SDXLBase:
    return open_base(micro_sdxl, precision="fp32")


@pytest.fixture
def micro_copy(micro_sdxl: Path, tmp_path: Path) -> Callable[[], Path]:
    """Makes copies of the micro model that a test may break."""

    def copy() -> Path:
        folder = tmp_path / f"copy-{len(list(tmp_path.glob('copy-*')))}"
        shutil.copytree(micro_sdxl, folder)
        return folder

    return copy


@pytest.fixture(scope="session")
def empty_sdxl() -> dict[str, Any]:
    """The four parts of the real SDXL, as `data` describes it, on the meta device: names and shapes, no memory."""
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    text, text_2 = (
        CLIPTextConfig.from_pretrained(CONFIGS, subfolder=part) for part in ("text_encoder", "text_encoder_2")
    )
    with init_empty_weights():
        return {
            "unet": UNet2DConditionModel.from_config(sdxl_config(UNet2DConditionModel, "unet", {})),
            "vae": AutoencoderKL.from_config(sdxl_config(AutoencoderKL, "vae", {})),
            "text_encoder": CLIPTextModel(text),
            "text_encoder_2": CLIPTextModelWithProjection(text_2),
        }


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def micro_tensors(micro_sdxl: Path) -> dict[str, Tensor]:
    """The micro model under the tensor names of a single-file SDXL checkpoint."""
    unet = load_file(micro_sdxl / "unet" / "diffusion_pytorch_model.safetensors")
    vae = load_file(micro_sdxl / "vae" / "diffusion_pytorch_model.safetensors")
    text = load_file(micro_sdxl / "text_encoder" / "model.safetensors")
    text_2 = load_file(micro_sdxl / "text_encoder_2" / "model.safetensors")
    first = {f"conditioner.embedders.0.transformer.text_model.{bare(name)}": value for name, value in text.items()}
    return {**published_unet(unet), **published_vae(vae), **first, **published_openclip(text_2)}


@pytest.fixture(scope="session")
def micro_checkpoint(micro_tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single-file checkpoint of the micro model. Open it with `configs=micro_sdxl`, whose sizes it has."""
    path = tmp_path_factory.mktemp("single") / "micro-single.safetensors"
    save_file(micro_tensors, path)
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five in three sizes. Read only: copy them before changing one."""
    folder = tmp_path_factory.mktemp("pictures")
    sizes = [(64, 64), (64, 64), (64, 64), (96, 48), (48, 96)]
    for number, size in enumerate(sizes):
        colour = (40 * number, 255 - 30 * number, 90)
        image = Image.new("RGB", size, colour)
        image.paste((255, 255, 255), (8, 8, 24 + number, 30))
        image.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture number {number}")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all test processes: what lies in it is found by its content."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"


@pytest.fixture
def run(tmp_path: Path, micro_base: SDXLBase, pictures: Path, cache: Path) -> Train:
    """Trains into this test's own folders, with caches that all tests share."""

    def call(config: TrainConfig = SMALL, where: str = "a", base: SDXLBase = micro_base, **more: Any) -> TrainResult:
        loras = tmp_path / where / "loras"
        kept = CacheFolders(more.pop("cache", cache))
        folders = RunFolders(loras, tmp_path / where / "runs", kept, lambda name: (loras / name).exists())
        dataset = more.pop("dataset", None) or load(pictures)
        return train_on(base, dataset, config, folders=folders, **more)

    return call


@pytest.fixture(scope="session")
def trained(micro_base: SDXLBase, pictures: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Finished runs, each trained once for all tests that only read it. To be called before anything is patched."""
    finished: dict[tuple[object, ...], TrainResult] = {}

    def call(config: TrainConfig = SMALL, **settings: Any) -> TrainResult:
        """`settings` are those of the data set."""
        key = (config, *sorted(settings.items()))
        if key not in finished:
            folder = tmp_path_factory.mktemp("trained")
            folders = RunFolders(folder / "loras", folder / "runs", CacheFolders(cache), lambda name: False)
            finished[key] = train_on(micro_base, load(pictures, **settings), config, folders=folders)
        return finished[key]

    return call
