from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxl_lora_core.generation import image_keys
from sdxl_lora_core.generation.config import GenerateConfig
from sdxl_lora_core.generation.image_keys import image_facts, image_settings, key_of
from sdxl_lora_core.generation.samplers import SOLVERS
from sdxl_lora_core.lora.stack import LoRARef, open_stack
from sdxl_lora_core.sdxl.base import SDXLBase, scheduler_config

REPOSITORY = Path(__file__).parents[2]
LORAS = (("a" * 64, 1.0, 0.5), ("b" * 64, 0.8, 0.8))


def config(**changes: Any) -> GenerateConfig:
    return GenerateConfig(**{"prompt": "a red circle", "negative_prompt": "blurry", **changes})


def key(
    base: SDXLBase,
    settings: GenerateConfig | None = None,
    loras: tuple[tuple[Any, ...], ...] = LORAS,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda:0",
    prompt: str = "a red circle",
    seed: int = 0,
) -> str:
    return key_of(
        image_facts(image_settings(base, settings or config(), loras, dtype, torch.device(device)), prompt, seed)
    )


def with_hash(base: SDXLBase, part: str) -> SDXLBase:
    hashes = tuple((name, "0" * 64 if name == part else digest) for name, digest in base.part_hashes)
    return dataclasses.replace(base, part_hashes=hashes)


# What is in the key

MOVES_PIXELS: dict[str, dict[str, Any]] = {
    "negative_prompt": {"negative_prompt": "sharp"},
    "steps": {"steps": 26},
    "guidance": {"guidance": 7.5},
    "width": {"width": 1032},
    "height": {"height": 1032},
    "sampler": {"sampler": "euler"},
    "scheduler": {"scheduler": "normal"},
    "guidance_rescale": {"guidance_rescale": 0.5},
    "guidance_start": {"guidance_start": 0.1},
    "guidance_end": {"guidance_end": 0.9},
    "batch_size": {"batch_size": 2},
    "attention": {"attention": "math"},
    "attention_slicing": {"attention_slicing": True},
    "vae_tiling": {"vae_tiling": True},
    "original_width": {"original_width": 512},
    "original_height": {"original_height": 512},
    "crop_left": {"crop_left": 512},
    "crop_top": {"crop_top": 512},
    "target_width": {"target_width": 512},
    "target_height": {"target_height": 512},
    "long_prompts": {"long_prompts": "chunks"},
    "prompt_syntax": {"prompt_syntax": "comfy"},
}
# prompt and seed enter by image; vae_slicing counts in batches only
# denoise only with an image to start from (test_start_images)
# the second pass and the size to tile from in test_second_pass
KEYED_OTHERWISE = {
    "prompt",
    "seed",
    "vae_slicing",
    "denoise",
    "vae_tiling_from",
    "hires_scale",
    "hires_denoise",
    "hires_steps",
}
GUIDANCE = [MOVES_PIXELS[option] for option in ("guidance_rescale", "guidance_start", "guidance_end")]
MOVES_NOTHING: dict[str, dict[str, Any]] = {
    "count": {"count": 4},
    "cache": {"cache": "only"},
    "prompt_per_line": {"prompt_per_line": True},
    "offload": {"offload": "phase"},
    "keep_latents": {"keep_latents": True},
}


def test_every_option_of_a_request_is_accounted_for() -> None:
    options = {field.name for field in dataclasses.fields(GenerateConfig)}
    assert options == {*MOVES_PIXELS, *KEYED_OTHERWISE, *MOVES_NOTHING}


def test_strengths_by_block_enter_the_key_only_where_there_are_some(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"x")

    def identity(blocks: str) -> list[Any]:
        (entry,) = open_stack([LoRARef(path, "x", 1.0, 0.5, blocks)], None)
        return entry.identity[1:]

    assert identity("") == [1.0, 0.5]
    assert identity("mid_block=0, up_blocks.0=0.5") == [1.0, 0.5, {"mid_block": 0.0, "up_blocks.0": 0.5}]
    assert identity("up_blocks.0=.5,mid_block=0") == identity("mid_block=0, up_blocks.0=0.5")


@pytest.mark.parametrize("option", MOVES_PIXELS)
def test_option_changes_the_key(micro_base: SDXLBase, option: str) -> None:
    assert key(micro_base, config(**MOVES_PIXELS[option])) != key(micro_base)


@pytest.mark.parametrize("option", MOVES_NOTHING)
def test_option_that_moves_nothing_leaves_the_key(micro_base: SDXLBase, option: str) -> None:
    assert key(micro_base, config(**MOVES_NOTHING[option])) == key(micro_base)


def test_width_and_height_are_told_apart(micro_base: SDXLBase) -> None:
    assert key(micro_base, config(width=512)) != key(micro_base, config(height=512))


def test_micro_conditioning_counts_by_what_the_model_is_told(micro_base: SDXLBase) -> None:
    said = config(original_width=1024, original_height=1024, target_width=1024, target_height=1024)
    assert key(micro_base, said) == key(micro_base)
    options = ("original_width", "original_height", "crop_left", "crop_top", "target_width", "target_height")
    assert len({key(micro_base, config(**{option: 512})) for option in options}) == len(options)


def test_keys_of_images_made_before_stay(micro_base: SDXLBase) -> None:
    """An option that came later is not in the settings while it stands at its default."""
    settings = image_settings(micro_base, config(), (), torch.bfloat16, torch.device("cuda"))
    assert set(settings) == {
        "base",
        "loras",
        "negative_prompt",
        "guidance",
        "steps",
        "size",
        "sampler",
        "schedule",
        "prompt_syntax",
        "dtype",
        "device",
        "attention",
        "attention_slicing",
        "vae_tiling",
        "vae_slicing",
        "batch_size",
        "libraries",
    }


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
def test_base_part_changes_the_key(micro_base: SDXLBase, part: str) -> None:
    assert key(with_hash(micro_base, part)) != key(micro_base)


@pytest.mark.parametrize("changes", [{"prediction_type": "v_prediction"}, {"zero_terminal_snr": True}], ids=str)
def test_kind_of_base_changes_the_key(micro_base: SDXLBase, changes: dict[str, Any]) -> None:
    assert key(dataclasses.replace(micro_base, **changes)) != key(micro_base)


@pytest.mark.parametrize(
    "loras",
    [
        (),
        LORAS[:1],
        LORAS[::-1],
        (*LORAS, LORAS[1]),
        (("c" * 64, 1.0, 0.5), LORAS[1]),
        (("a" * 64, 1.01, 0.5), LORAS[1]),
        (("a" * 64, 1.0, 0.51), LORAS[1]),
        (("a" * 64, 0.5, 1.0), LORAS[1]),
        ((*LORAS[0], {"mid_block": 0.5}), LORAS[1]),
    ],
    ids=["none", "one less", "order", "twice", "content", "UNet strength", "text strength", "swapped", "blocks"],
)
def test_lora_stack_changes_the_key(micro_base: SDXLBase, loras: tuple[tuple[Any, ...], ...]) -> None:
    assert key(micro_base, loras=loras) != key(micro_base)


@pytest.mark.parametrize(
    "changes",
    [{"prompt": "a red circle "}, {"prompt": "A red circle"}, {"seed": 1}, {"dtype": torch.float16}, {"device": "cpu"}],
    ids=str,
)
def test_prompt_seed_and_machine_change_the_key(micro_base: SDXLBase, changes: dict[str, Any]) -> None:
    assert key(micro_base, **changes) != key(micro_base)


@pytest.mark.parametrize("library", ["torch", "diffusers"])
def test_minor_version_changes_the_key_and_patch_does_not(
    micro_base: SDXLBase, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_version(number: str) -> str:
        monkeypatch.setattr(image_keys, "version", lambda name: number if name == library else "1.0.0")
        return key(micro_base)

    assert with_version("2.13.0+cpu") == with_version("2.13.1+cu130") != with_version("2.14.0")


def test_parser_version_changes_the_key(micro_base: SDXLBase, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(micro_base)
    monkeypatch.setitem(image_keys.PARSER_VERSIONS, "plain", 2)
    assert key(micro_base) != before


def test_what_the_syntax_does_anyway_is_not_in_the_key(micro_base: SDXLBase) -> None:
    comfy = config(prompt_syntax="comfy")
    assert key(micro_base, dataclasses.replace(comfy, long_prompts="chunks")) == key(micro_base, comfy)


def test_embeddings_change_the_key(micro_base: SDXLBase) -> None:
    settings = image_settings(micro_base, config(prompt_syntax="comfy"), LORAS, torch.bfloat16, torch.device("cuda"))
    keys = {
        key_of(image_facts(settings, "a", 0, used)) for used in ((), ("1" * 64,), ("2" * 64,), ("1" * 64, "2" * 64))
    }
    assert len(keys) == 4


def test_vae_slicing_counts_in_batches_only(micro_base: SDXLBase) -> None:
    assert key(micro_base, config(vae_slicing=True)) == key(micro_base)
    batches = config(batch_size=2)
    assert key(micro_base, dataclasses.replace(batches, vae_slicing=True)) != key(micro_base, batches)


def test_every_sampler_and_schedule_has_a_key_of_its_own(micro_base: SDXLBase) -> None:
    pairs = [(sampler, schedule) for sampler, solver in SOLVERS.items() for schedule in solver.schedules]
    keys = {key(micro_base, config(sampler=sampler, scheduler=schedule)) for sampler, schedule in pairs}
    assert len(keys) == len(pairs)


def test_zero_snr_bases_have_the_rescale_that_they_need_in_the_key(micro_base: SDXLBase) -> None:
    base = dataclasses.replace(micro_base, zero_terminal_snr=True)
    assert key(base, config(guidance_rescale=0.7)) == key(base) != key(base, config(guidance_rescale=0))


# What is not


def test_what_came_later_leaves_the_keys_of_older_images(micro_base: SDXLBase) -> None:
    settings = image_settings(micro_base, config(), (), torch.bfloat16, torch.device("cuda"))
    assert settings["schedule"] == {
        **scheduler_config(micro_base),
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "use_karras_sigmas": True,
    }
    assert " ".join(settings) == (
        "base loras negative_prompt guidance steps size sampler schedule prompt_syntax dtype device attention "
        "attention_slicing vae_tiling vae_slicing batch_size libraries"
    )


def test_images_of_an_older_way_of_merging_are_not_found(micro_base: SDXLBase, monkeypatch: pytest.MonkeyPatch) -> None:
    merged, plain = key(micro_base), key(micro_base, loras=())
    monkeypatch.setattr(image_keys, "MERGE_VERSION", 1)
    assert key(micro_base) != merged and key(micro_base, loras=()) == plain


def test_place_and_name_of_the_base_are_not_in_the_key(micro_base: SDXLBase) -> None:
    renamed = dataclasses.replace(micro_base, path=Path("elsewhere"), name="renamed", precision="auto")
    assert key(renamed) == key(micro_base)


def test_second_gpu_has_the_same_key(micro_base: SDXLBase) -> None:
    assert key(micro_base, device="cuda:1") == key(micro_base)


def test_attention_auto_is_sdpa(micro_base: SDXLBase) -> None:
    assert key(micro_base, config(attention="sdpa")) == key(micro_base, config(attention="auto"))


def test_numbers_are_equal_whatever_their_type(micro_base: SDXLBase) -> None:
    loras = ((LORAS[0][0], 1, 0.5), LORAS[1])
    assert key(micro_base, config(guidance=7), loras=loras) == key(micro_base, config(guidance=7.0))


def test_without_guidance_its_settings_are_not_in_the_key(micro_base: SDXLBase) -> None:
    keys = [key(micro_base, config(guidance=1, **changes)) for changes in GUIDANCE]
    assert set(keys) == {key(micro_base, config(guidance=1))}


def test_without_guidance_the_negative_prompt_is_not_in_the_key(micro_base: SDXLBase) -> None:
    keys = {key(micro_base, config(guidance=guidance, negative_prompt=text)) for guidance in (0, 1) for text in "ab"}
    assert len(keys) == 1


KEY = """
import sys
from pathlib import Path
import torch
from sdxl_lora_core.sdxl.base import open_base
from sdxl_lora_core.generation.config import GenerateConfig
from sdxl_lora_core.generation.image_keys import image_facts, image_settings, key_of
from sdxl_lora_core.generation.samplers import SOLVERS
config = GenerateConfig(prompt="a red circle", negative_prompt="blurry")
loras = (("a" * 64, 1.0, 0.5), ("b" * 64, 0.8, 0.8))
settings = image_settings(open_base(Path(sys.argv[1])), config, loras, torch.bfloat16, torch.device("cuda:0"))
print(key_of(image_facts(settings, "a red circle", 0)))
"""


@pytest.mark.slow
def test_key_is_the_same_in_another_process(micro_sdxl: Path, micro_base: SDXLBase) -> None:
    command = [sys.executable, "-c", KEY, str(micro_sdxl)]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    answer = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == key(micro_base)
