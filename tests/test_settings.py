from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sdxl_lora_core.dataset.config import DatasetConfig
from sdxl_lora_core.generation.config import GenerateConfig
from sdxl_lora_core.settings import from_mapping, to_yaml
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
