"""Stable Diffusion 1.5 bases: what is opened, what is refused, and images against diffusers' own pipeline."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_lora_core.cache.folders import CacheFolders
from sdxl_lora_core.control.control_net import require_fit
from sdxl_lora_core.evaluation.comparison import ComparisonJob, compare
from sdxl_lora_core.evaluation.comparison_report import as_json, table_rows
from sdxl_lora_core.evaluation.variants import Variant
from sdxl_lora_core.generation.generate import generate
from sdxl_lora_core.generation.job import GenerationContext, GenerationJob
from sdxl_lora_core.generation.samplers import SAMPLERS, SOLVERS, Sampler
from sdxl_lora_core.lora.config import SaveBaseConfig
from sdxl_lora_core.lora.merged_base import save_merged_base
from sdxl_lora_core.runtime.loaded_parts import LoadedParts
from sdxl_lora_core.sdxl.base import (
    SDXLBase,
    describe_base,
    load_part,
    native_side,
    open_base,
    open_sd15_base,
    require_vae,
)
from sdxl_lora_core.sdxl.family import SD15
from sdxl_lora_core.sdxl.vae_override import with_vae
from sdxl_lora_core.text.embedding_files import open_embedding
from sdxl_lora_core.training.config.train_config import TrainConfig
from sdxl_lora_core.training.run.runs import RunFolders
from tests.generation.plain_diffusers import reference
from tests.micro.images import CPU, SHARED, edit_json, pixels, settings, write_lora
from tests.micro.runs import load, train_on
from tests.micro.sd15 import as_single_file, write_micro_sd15


@pytest.fixture(scope="session")
def micro_sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd15") / "micro-sd15"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        write_micro_sd15(folder)
    return folder


@pytest.fixture(scope="session")
def sd15(micro_sd15: Path) -> SDXLBase:
    return open_sd15_base(micro_sd15, "fp32")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_equals_diffusers_own_pipeline(micro_sd15: Path, sd15: SDXLBase, sampler: Sampler) -> None:
    config = settings(steps=5, sampler=sampler, scheduler=SOLVERS[sampler].schedules[0], negative_prompt="grey")
    expected = reference(micro_sd15, config)
    assert expected.std() > 5
    assert abs(pixels(sd15, config)[0] - expected).max() <= 1


def test_half_precision_without_guidance(micro_sd15: Path, sd15: SDXLBase) -> None:
    config = settings(guidance=1.0)
    exact = pixels(sd15, config)[0].astype(int)
    assert abs(pixels(sd15, config)[0] - reference(micro_sd15, config)).max() <= 1
    half = pixels(dataclasses.replace(sd15, precision="bf16"), config)[0]
    assert 0 < abs(half - exact).max() < 40


def test_single_file_makes_the_same_image(tmp_path: Path, micro_sd15: Path, sd15: SDXLBase) -> None:
    file = tmp_path / "v1-5.safetensors"
    as_single_file(micro_sd15, file)
    opened = open_sd15_base(file, "fp32", configs=micro_sd15)
    assert opened.layout == "single_file" and opened.family == SD15
    np.testing.assert_array_equal(pixels(opened, settings()), pixels(sd15, settings()))


def test_single_file_with_older_names_and_leftovers_makes_the_same_image(
    tmp_path: Path, micro_sd15: Path, sd15: SDXLBase
) -> None:
    file = tmp_path / "merge.safetensors"
    as_single_file(micro_sd15, file)
    tensors = {
        name.replace(".transformer.text_model.", ".transformer."): value for name, value in load_file(file).items()
    }
    leftovers = (
        "first_stage_model.model_ema.decay",
        "cond_stage_model.transformer.text_projection.weight",
        "lora_te_x.alpha",
    )
    save_file(tensors | {name: torch.ones(1) for name in leftovers}, file)
    np.testing.assert_array_equal(
        pixels(open_sd15_base(file, "fp32", configs=micro_sd15), settings()), pixels(sd15, settings())
    )


def test_single_file_with_a_stray_or_missing_tensor_is_refused(tmp_path: Path, micro_sd15: Path) -> None:
    file = tmp_path / "v1-5.safetensors"
    as_single_file(micro_sd15, file)
    tensors = load_file(file)
    save_file({**tensors, "model.diffusion_model.time_embed.9.weight": torch.ones(2, 2)}, file)
    with pytest.raises(ValueError, match="the unet in v1-5.safetensors does not fit: 1 tensors .*time_embed.9"):
        load_part(open_sd15_base(file, configs=micro_sd15), "unet", torch.float32)
    tensors.pop("cond_stage_model.transformer.text_model.final_layer_norm.bias")
    save_file(tensors, file)
    with pytest.raises(ValueError, match="final_layer_norm"):
        load_part(open_sd15_base(file, configs=micro_sd15), "text_encoder", torch.float32)


def test_the_published_size_is_what_the_settings_describe() -> None:
    """860 million parameters in the UNet, 123 million in the text encoder, 84 million in the VAE, as published."""
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with init_empty_weights():
        models: list[Any] = [
            UNet2DConditionModel.from_config(json.loads((SD15.configs / "unet/config.json").read_text())),
            CLIPTextModel(CLIPTextConfig.from_pretrained(SD15.configs / "text_encoder")),
            AutoencoderKL.from_config(json.loads((SD15.configs / "vae/config.json").read_text())),
        ]
    counts = [sum(weight.numel() for weight in model.parameters()) for model in models]
    assert counts == [859_520_964, 123_060_480, 83_653_863]


def test_description_and_own_size(micro_sd15: Path, sd15: SDXLBase) -> None:
    assert describe_base(sd15).startswith("micro-sd15: Stable Diffusion 1.5, diffusers folder, ")
    assert native_side(sd15) == 64
    assert [name for name, _ in sd15.part_hashes] == ["text_encoder", "tokenizer", "unet", "vae"]


def test_other_models_are_named(tmp_path: Path, micro_sdxl: Path, micro_sd15: Path) -> None:
    with pytest.raises(ValueError, match="StableDiffusionXLPipeline and not a StableDiffusionPipeline: use a Stable D"):
        open_sd15_base(micro_sdxl)
    with pytest.raises(ValueError, match="StableDiffusionPipeline and not a StableDiffusionXLPipeline: use an SDXL"):
        open_base(micro_sd15)
    file = tmp_path / "v1-5.safetensors"
    as_single_file(micro_sd15, file)
    with pytest.raises(ValueError, match=r"is a Stable Diffusion 1.x checkpoint: use an SDXL base"):
        open_base(file)
    with pytest.raises(ValueError, match="takes text of width 12 where Stable Diffusion 1.5 takes 768"):
        open_sd15_base(file)
    with pytest.raises(FileNotFoundError, match=r"gone.safetensors does not exist: use a Stable Diffusion 1.5 base"):
        open_sd15_base(tmp_path / "gone.safetensors")


def test_a_folder_of_stable_diffusion_2_is_refused(tmp_path: Path, micro_sd15: Path) -> None:
    folder = tmp_path / "sd2"
    shutil.copytree(micro_sd15, folder)
    edit_json(folder / "unet/config.json", cross_attention_dim=1024)
    with pytest.raises(ValueError, match="text of width 1024 .* but the text encoders give 12"):
        open_sd15_base(folder)
    edit_json(folder / "text_encoder/config.json", hidden_size=1024)
    with pytest.raises(ValueError, match=r"sd2 is a Stable Diffusion 2.x model: use a Stable Diffusion 1.5 base"):
        open_sd15_base(folder)
    edit_json(folder / "unet/config.json", in_channels=9)
    with pytest.raises(ValueError, match="an inpainting model"):
        open_sd15_base(folder)


def test_another_vae_and_another_prediction_type_take_effect(tmp_path: Path, micro_sd15: Path, sd15: SDXLBase) -> None:
    own = pixels(sd15, settings())
    assert abs(pixels(open_sd15_base(micro_sd15, "fp32", prediction="v_prediction"), settings()) - own).max() > 0
    vae = tmp_path / "vae"
    shutil.copytree(micro_sd15 / "vae", vae)
    edit_json(vae / "config.json", scaling_factor=0.13025)
    with pytest.raises(ValueError, match="scaling_factor 0.13025 where the base's VAE has 0.18215"):
        with_vae(sd15, vae)
    file = tmp_path / "v1-5.safetensors"
    as_single_file(micro_sd15, file)
    save_file({name: value for name, value in load_file(file).items() if "first_stage" not in name}, file)
    with pytest.raises(ValueError, match="without its VAE, .* such as Stable Diffusion 1.5's own"):
        require_vae(open_sd15_base(file, configs=micro_sd15))


def test_weights_and_embeddings_in_prompts(tmp_path: Path, sd15: SDXLBase) -> None:
    """Those of Stable Diffusion 1, under either name of their only tensor, and the first half of SDXL's."""
    files = {}
    for name, tensors in {
        "a1111": {"emb_params": torch.full((2, 12), 0.5)},
        "diffusers": {"<cat>": torch.full((2, 12), 0.5)},
        "sdxl": {"clip_l": torch.full((2, 12), 0.5), "clip_g": torch.ones(2, 20)},
        "wide": {"emb_params": torch.ones(1, 1024)},
    }.items():
        files[name] = tmp_path / f"{name}.safetensors"
        save_file(tensors, files[name])

    def made(prompt: str) -> np.ndarray:
        config = settings(prompt=prompt, prompt_syntax="comfy")
        return generate(GenerationJob(sd15, config), GenerationContext(SHARED, find_embedding=files.get))[0].pixels

    images = [made(f"a cat, embedding:{name}") for name in ("a1111", "diffusers", "sdxl")]
    np.testing.assert_array_equal(images[0], images[1])
    np.testing.assert_array_equal(images[0], images[2])
    assert abs(made("a cat") - images[0].astype(int)).max() > 0
    assert abs(made("a (cat:1.5)") - made("a cat").astype(int)).max() > 0
    with pytest.raises(ValueError, match="vectors of 1024 numbers for clip_l, and this base's have 12"):
        made("embedding:wide")
    with pytest.raises(ValueError, match=r"embedding:a1111 is not an embedding for SDXL"):
        open_embedding("a1111", files["a1111"], None)


def test_long_prompts_in_chunks(sd15: SDXLBase) -> None:
    long = "a red circle " * 40
    cut, chunks = (pixels(sd15, settings(prompt=long, long_prompts=how)) for how in ("cut", "chunks"))
    assert abs(cut - chunks.astype(int)).max() > 0


def test_the_cache_finds_the_image_and_tells_the_families_apart(
    tmp_path: Path, sd15: SDXLBase, micro_base: SDXLBase
) -> None:
    context = GenerationContext(SHARED, CacheFolders(tmp_path))
    made, again = (generate(GenerationJob(sd15, settings()), context)[0] for _ in range(2))
    assert not made.hit and again.hit and made.key == again.key
    np.testing.assert_array_equal(made.pixels, again.pixels)
    assert generate(GenerationJob(micro_base, settings()), context)[0].key != made.key


def test_changing_between_families_keeps_one_of_each_part(sd15: SDXLBase, micro_base: SDXLBase) -> None:
    parts = LoadedParts(CPU)
    images = [
        generate(GenerationJob(base, settings()), GenerationContext(parts))[0].pixels
        for base in (micro_base, sd15, micro_base, sd15)
    ]
    np.testing.assert_array_equal(images[0], images[2])
    np.testing.assert_array_equal(images[1], images[3])
    assert set(parts._held) == {"text_encoders", "unet", "vae"}


def test_a_preview_says_which_family_its_latents_are_of(sd15: SDXLBase) -> None:
    seen = []
    context = GenerationContext(SHARED, on_estimate=lambda latents, family: seen.append((latents.shape, family)))
    generate(GenerationJob(sd15, settings()), context)
    assert seen == [((1, 4, 8, 8), SD15)] * 3


def test_what_is_for_sdxl_only_is_refused_by_name(
    tmp_path: Path, sd15: SDXLBase, micro_base: SDXLBase, pictures: Path
) -> None:
    lora = write_lora(tmp_path / "style.safetensors", micro_base, 0)
    context = GenerationContext(LoadedParts(CPU))
    reason = "needs an SDXL base, and micro-sd15 is a Stable Diffusion 1.5 base"
    with pytest.raises(ValueError, match=f"LoRA .* {reason}"):
        generate(GenerationJob(sd15, settings(), [lora]), context)
    off = dataclasses.replace(lora, strength_model=0.0, strength_clip=0.0)
    assert len(generate(GenerationJob(sd15, settings(), [off]), context)) == 1
    with pytest.raises(ValueError, match=f"micro-conditioning .* {reason}"):
        generate(GenerationJob(sd15, settings(original_width=512)), context)
    net: Any = type("Net", (), {"name": "canny"})()
    with pytest.raises(ValueError, match=f"ControlNet canny {reason}"):
        require_fit(net, sd15)
    with pytest.raises(ValueError, match=f"saving a merged base {reason}"):
        save_merged_base(sd15, [], SaveBaseConfig(base_name="x"), tmp_path, lambda name: False)
    folders = RunFolders(tmp_path, tmp_path, CacheFolders(tmp_path), lambda name: False)
    with pytest.raises(ValueError, match=f"training {reason}"):
        train_on(sd15, load(pictures), TrainConfig(steps=1), folders=folders)


class Brightness:
    name = title = "brightness"

    def score(self, images: Any, prompts: Any) -> list[float]:
        return [float(image.mean()) for image in images]


def test_sd15_against_sdxl_against_sdxl_with_a_lora(tmp_path: Path, sd15: SDXLBase, micro_base: SDXLBase) -> None:
    """Each in its own size; mean and deviation of the score over the images of all prompts."""
    config = settings(prompt="a red circle\na blue star", prompt_per_line=True, count=2)
    variants = (
        Variant("SDXL"),
        Variant("SDXL + LoRA", (write_lora(tmp_path / "style.safetensors", micro_base, 0),)),
        Variant("SD 1.5", settings={"width": 72, "height": 72}, base=sd15),
    )
    found = compare(ComparisonJob(micro_base, config, variants, (Brightness(),)), GenerationContext(SHARED))
    images = [[cell.pixels for cell in result.cells if cell] for result in found.results]
    assert [image[0].shape[0] for image in images] == [64, 64, 72]
    small = dataclasses.replace(config, width=72, height=72)
    np.testing.assert_array_equal(np.stack(images[2]), pixels(sd15, small))
    for row, own in zip(table_rows(found, "brightness"), images, strict=True):
        means = np.array([image.mean() for image in own])
        assert row["mean"] == pytest.approx(means.mean(), abs=1e-3)
        assert row["deviation"] == pytest.approx(means.std(ddof=1), abs=1e-3)
    assert [variant.get("base") for variant in as_json(found)["variants"]] == [None, None, "micro-sd15"]


def test_a_lora_on_sd15_ends_a_comparison_before_its_first_image(
    tmp_path: Path, sd15: SDXLBase, micro_base: SDXLBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = (
        Variant("SDXL"),
        Variant("both", (write_lora(tmp_path / "style.safetensors", micro_base, 0),), base=sd15),
    )
    calls: list[str] = []
    with pytest.raises(ValueError, match="needs an SDXL base"):
        compare(
            ComparisonJob(micro_base, settings(), variants),
            GenerationContext(SHARED),
            lambda done, total, name: calls.append(name),
        )
    assert not calls


def test_v_prediction_of_a_single_file_is_read(tmp_path: Path, micro_sd15: Path) -> None:
    file: Callable[[str], Path] = lambda name: tmp_path / name  # noqa: E731
    as_single_file(micro_sd15, file("v.safetensors"), {"modelspec.prediction_type": "v"})
    assert open_sd15_base(file("v.safetensors"), configs=micro_sd15).prediction_type == "v_prediction"
