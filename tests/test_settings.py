from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sdxl_lora_core.dataset.config import DatasetConfig
from sdxl_lora_core.generation.config import GenerateConfig
from sdxl_lora_core.settings import from_mapping, to_yaml, without_effect
from sdxl_lora_core.training.config.train_config import TrainConfig


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (TrainConfig, {"steps": 0}, "steps is 0: give a value from 1"),
        (TrainConfig, {"rank": 0}, "rank is 0"),
        (TrainConfig, {"learning_rate": 0.0}, "learning_rate is 0"),
        (TrainConfig, {"lora_name": "a/b"}, "lora_name is 'a/b'"),
        (TrainConfig, {"lora_name": ""}, "lora_name is ''"),
        (TrainConfig, {"lora_name": ".."}, "lora_name is '..'"),
        (TrainConfig, {"lr_schedule": "spiral"}, "choose one of constant, linear, cosine"),
        (TrainConfig, {"steps": 10, "lr_warmup_steps": 10}, "lr_warmup_steps is 10 and steps is 10"),
        (DatasetConfig, {"resolution": 1000}, "multiple of 16"),
        (DatasetConfig, {"validation_percent": 60}, "from 0 to 50"),
        (GenerateConfig, {"prompt": "x", "width": 1001}, "width is 1001: use a multiple of 8, such as 1000"),
        (
            GenerateConfig,
            {"prompt": "x", "attention": "sdpa", "attention_slicing": True},
            "attention is 'sdpa' with attention_slicing on",
        ),
        (GenerateConfig, {"prompt": "x", "sampler": "dpm_fast"}, "sampler is 'dpm_fast': choose one of dpmpp_2m, "),
        (
            GenerateConfig,
            {"prompt": "x", "sampler": "ddim"},
            "scheduler is 'karras', which sampler 'ddim' does not support: choose one of ddim_uniform, sgm_uniform",
        ),
        (GenerateConfig, {"prompt": "x", "guidance_rescale": -0.5}, "guidance_rescale is -0.5: give a value from 0"),
        (
            GenerateConfig,
            {"prompt": "x", "guidance_start": 0.8, "guidance_end": 0.3},
            "guidance_start is 0.8 and guidance_end 0.3",
        ),
        (GenerateConfig, {"prompt": "x", "count": 0}, "count is 0"),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(config: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        config(**values)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"sample_steps": 12}, "sample_steps is 12, which has no effect while sample_prompts is empty"),
        ({"sample_every": 5}, "sample_every is 5, which has no effect while sample_prompts is empty"),
        ({"sample_guidance": 3.0}, "sample_guidance is 3.0, which"),
        ({"clip_model": "x"}, "clip_model is 'x', which"),
        ({"optimizer": "lion", "adam_beta2": 0.9}, "adam_beta2 is 0.9, which has no effect while optimizer is 'lion'"),
        ({"optimizer": "adafactor", "adam_beta1": 0.5}, "adam_beta1 is 0.5, which"),
        ({"lr_cycles": 2}, "lr_cycles is 2, which has no effect while lr_schedule is 'constant'"),
        ({"lr_power": 3.0}, "lr_power is 3.0, which"),
        ({"huber_delta": 0.5}, "huber_delta is 0.5, which has no effect while loss is 'mse'"),
        ({"logit_mean": 1.0}, "logit_mean is 1.0, which has no effect while timestep_sampling is 'uniform'"),
        ({"logit_std": 2.0}, "logit_std is 2.0, which"),
        ({"multires_noise_discount": 0.5}, "multires_noise_discount is 0.5, which"),
        ({"keep_tags": 2}, "keep_tags is 2, which has no effect while shuffle_tags is off and tag_dropout is 0.0"),
        ({"caption_variants": 2}, "caption_variants is 2, which"),
        ({"tag_separator": ";"}, "tag_separator is ';', which"),
        ({"class_images": 3}, "class_images is 3, which has no effect while class_prompt is empty"),
        ({"vectors_per_token": 3}, "vectors_per_token is 3, which has no effect while new_tokens is empty"),
        ({"token_learning_rate": 0.1}, "token_learning_rate is 0.1, which"),
        ({"train_unet": False, "new_tokens": "a", "learning_rate": 0.5}, "learning_rate is 0.5, which"),
        ({"train_unet": False, "text_encoder_learning_rate": 1e-4, "block_ranks": "mid_block=4"}, "block_ranks is "),
    ],
)
def test_a_setting_without_effect_is_a_note(values: dict[str, Any], reason: str) -> None:
    """It used to be an error, which punished users who had cleared another setting."""
    notes = without_effect(TrainConfig(**values))
    assert list(notes) == [list(values)[-1]] and [*notes.values()][0].startswith(reason)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"sample_steps": 12, "sample_prompts": ("a",)},
        {"keep_tags": 2, "shuffle_tags": True},
        {"keep_tags": 2, "tag_dropout": 0.5},
        {"optimizer": "lion", "adam_beta1": 0.5},
    ],
)
def test_a_setting_with_effect_has_no_note(values: dict[str, Any]) -> None:
    assert without_effect(TrainConfig(**values)) == {}


def test_one_prompt_or_one_a_line() -> None:
    assert GenerateConfig(prompt="a\nb").prompts == ("a\nb",)
    assert GenerateConfig(prompt=" a \n\nb", prompt_per_line=True).prompts == ("a", "b")
    assert GenerateConfig(prompt="", prompt_per_line=True).prompts == ("",)


def test_settings_survive_yaml(tmp_path: Path) -> None:
    config = TrainConfig(lora_name="naïve", steps=7, sample_prompts=("a", "b"), precision="fp32")
    to_yaml(tmp_path / "run.yaml", {"train": config})
    read = yaml.safe_load((tmp_path / "run.yaml").read_text(encoding="utf-8"))
    assert from_mapping(TrainConfig, read["train"], "run.yaml") == config


EMPTY_NAME = "lora_name is '': use a name that neither is empty nor begins or ends with a dot or a space"


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (TrainConfig, {"lora_name": ""}, EMPTY_NAME),
        (TrainConfig, {"steps": "many"}, "steps is 'many': give a whole number from 1 to 1000000"),
        (TrainConfig, {"rank": 2.5, "seed": []}, None),
        (TrainConfig, {"learning_rate": "fast"}, "learning_rate is 'fast': give a number from 1e-08 to 1"),
        (TrainConfig, {"masked_loss": "maybe"}, "masked_loss is 'maybe': give true or false"),
        (TrainConfig, {"blocks": 3}, "blocks is 3: give a text"),
        (TrainConfig, {"loss": "l3"}, "loss is 'l3': give one of mse, huber, smooth_l1"),
        (TrainConfig, {"sample_prompts": "a cat"}, "sample_prompts is 'a cat': give a list of texts"),
        (TrainConfig, {"sample_prompts": ["a cat", 5]}, "sample_prompts contains 5: give a list of texts"),
        (
            TrainConfig,
            {"tensorboard": False},
            "tensorboard is False: give one of auto, off, in quotes, because YAML reads on and off as true and false",
        ),
        (GenerateConfig, {}, "prompt is missing: give a text"),
        (DatasetConfig, {"resolution": 1000}, "resolution is 1000: give a multiple of 16"),
    ],
)
def test_a_wrong_value_is_one_sentence_in_our_words(config: Any, values: dict[str, Any], message: str | None) -> None:
    if message is None:
        message = (
            f"seed is []: give a whole number from 0 to {2**64 - 1}; rank is 2.5: give a whole number from 1 to 1024"
        )
    with pytest.raises(ValueError) as raised:
        from_mapping(config, values)
    assert str(raised.value) == message
    with pytest.raises(ValueError) as raised:
        from_mapping(config, values, "run.yaml line 7: train")
    assert str(raised.value) == f"run.yaml line 7: train: {message}"


def test_unknown_settings_are_named() -> None:
    with pytest.raises(ValueError, match="^unknown setting network_dim; known are .*rank"):
        from_mapping(TrainConfig, {"network_dim": 8})
    with pytest.raises(ValueError, match="^run.yaml: unknown setting network_dim; known are .*rank"):
        from_mapping(TrainConfig, {"network_dim": 8}, "run.yaml")
