"""What a LoRA's metadata, a report and a PNG say was used is what was used: every field of each."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdxl_lora_core.dataset.caption_dataset import CaptionDataset, load_caption_dataset
from sdxl_lora_core.dataset.config import DatasetConfig
from sdxl_lora_core.files import file_sha256
from sdxl_lora_core.generation.init_images import start_images
from sdxl_lora_core.generation.png_metadata import PngTexts
from sdxl_lora_core.lora.files import read_lora
from sdxl_lora_core.sdxl.base import SDXLBase, open_base
from sdxl_lora_core.training.data.batches import Batch
from sdxl_lora_core.training.model.trainable import TrainableSDXL
from sdxl_lora_core.training.monitor.progress import StepReport
from tests.generation.test_init_images import picture
from tests.micro.controls import control, random_net, save_single
from tests.micro.images import draw, edit_json, settings, weighted, write_lora
from tests.micro.runs import SMALL, Losses, Train, change_losses, load

pytestmark = pytest.mark.slow

# A LoRA's metadata

SAI = "https://github.com/Stability-AI/generative-models"
# Of a run with SMALL on `four`, four pictures seen three times in an epoch.
PLAIN = {
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    "modelspec.implementation": SAI,
    "modelspec.prediction_type": "epsilon",
    "modelspec.resolution": "64x64",
    "modelspec.sai_model_spec": "1.0.0",
    "modelspec.title": "small",
    "modelspec.trigger_phrase": "zxq",
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_caption_dropout_rate": "0.0",
    "ss_dataset_dirs": '{"pictures0":{"img_count":4,"n_repeats":3}}',
    "ss_datasets": json.dumps(
        [
            {
                "batch_size_per_device": 2,
                "enable_bucket": True,
                "is_dreambooth": True,
                "num_train_images": 12,
                "resolution": [64, 64],
                "subsets": [{"class_tokens": "zxq", "image_dir": "pictures0", "img_count": 4, "num_repeats": 3}],
            }
        ],
        separators=(",", ":"),
    ),
    "ss_enable_bucket": "True",
    "ss_gradient_accumulation_steps": "1",
    "ss_learning_rate": "0.001",
    "ss_lr_scheduler": "constant",
    "ss_lr_warmup_steps": "0",
    "ss_max_grad_norm": "1.0",
    "ss_max_train_steps": "4",
    "ss_mixed_precision": "no",
    "ss_network_alpha": "4.0",
    "ss_network_args": '{"blocks":"mid_block","target_modules":"attention"}',
    "ss_network_dim": "2",
    "ss_network_dropout": "0.0",
    "ss_network_module": "networks.lora",
    "ss_num_reg_images": "0",
    "ss_num_train_images": "12",
    "ss_optimizer": "torch.optim.AdamW(betas=(0.9, 0.999),weight_decay=0.01)",
    "ss_output_name": "small",
    "ss_resolution": "(64, 64)",
    "ss_sd_model_name": "micro-sdxl",
    "ss_seed": "0",
    "ss_steps": "4",
    "ss_tag_frequency": json.dumps(
        {"pictures0": {**{f"picture number {number}": 1 for number in range(4)}, "zxq": 4}}, separators=(",", ":")
    ),
    "ss_total_batch_size": "2",
    "ss_unet_lr": "0.001",
    "ss_v_parameterization": "False",
    "ss_zero_terminal_snr": "False",
}
BASE = ("ss_sd_model_hash", "ss_new_sd_model_hash")  # the base's, and the file's own
OWN = ("sshs_model_hash", "modelspec.hash_sha256")

# Settings away from their defaults, and the fields that they change.
CASES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "plain": ({}, {}),
    "lora": (
        {
            "seed": 7,
            "gradient_accumulation": 2,
            "learning_rate": 2e-3,
            "lr_schedule": "cosine",
            "lr_warmup_steps": 2,
            "max_grad_norm": 0.5,
            "optimizer": "lion",
            "weight_decay": 0.1,
            "dropout": 0.1,
            "use_rslora": True,
            "lora_plus_ratio": 2.0,
            "text_encoder_learning_rate": 1e-3,
            "save_format": "peft",
        },
        {
            "modelspec.implementation": "diffusers",
            "ss_gradient_accumulation_steps": "2",
            "ss_learning_rate": "0.002",
            "ss_lr_scheduler": "cosine",
            "ss_lr_warmup_steps": "2",
            "ss_max_grad_norm": "0.5",
            "ss_network_args": (
                '{"blocks":"mid_block","loraplus_lr_ratio":"2.0","rs_lora":"True","target_modules":"attention"}'
            ),
            "ss_network_dropout": "0.1",
            "ss_optimizer": "pytorch_optimizer.Lion(betas=(0.9, 0.99),weight_decay=0.1)",
            "ss_seed": "7",
            "ss_text_encoder_lr": "[0.001, 0.0]",
            "ss_total_batch_size": "4",
            "ss_unet_lr": "0.002",
        },
    ),
    "dora on captions": (
        {
            "adapter": "dora",
            "precision": "bf16",
            "shuffle_tags": True,
            "keep_tags": 1,
            "tag_dropout": 0.1,
            "caption_dropout": 0.2,
            "caption_chunks": 2,
            "block_ranks": "mid_block=3",
            "block_learning_rates": "mid_block=0.002",
        },
        {
            "ss_caption_dropout_rate": "0.2",
            "ss_caption_tag_dropout_rate": "0.1",
            "ss_keep_tokens": "1",
            "ss_max_token_length": "150",
            "ss_mixed_precision": "bf16",
            "ss_network_args": (
                '{"algo":"lora","block_learning_rates":"mid_block=0.002","block_ranks":"mid_block=3",'
                '"blocks":"mid_block","dora_wd":"True","target_modules":"attention","wd_on_output":"True"}'
            ),
            "ss_network_module": "lycoris.kohya",
            "ss_shuffle_caption": "True",
        },
    ),
    "lokr and the loss": (
        {
            "adapter": "lokr",
            "rank_dropout": 0.1,
            "module_dropout": 0.2,
            "loss": "huber",
            "huber_delta": 0.2,
            "snr_gamma": 5.0,
            "multires_noise_iterations": 3,
            "multires_noise_discount": 0.4,
            "input_perturbation": 0.1,
            "prediction": "v_prediction",
            "zero_terminal_snr": "on",
        },
        {
            "modelspec.prediction_type": "v",
            "ss_huber_c": "0.2",
            "ss_ip_noise_gamma": "0.1",
            "ss_loss_type": "huber",
            "ss_min_snr_gamma": "5.0",
            "ss_multires_noise_discount": "0.4",
            "ss_multires_noise_iterations": "3",
            "ss_network_args": (
                '{"algo":"lokr","blocks":"mid_block","module_dropout":"0.2","rank_dropout":"0.1",'
                '"target_modules":"attention"}'
            ),
            "ss_network_module": "lycoris.kohya",
            "ss_v_parameterization": "True",
            "ss_zero_terminal_snr": "True",
        },
    ),
    "the kept step": (
        {"steps": 6, "validate_every": 2, "keep_best": "validation_loss", "noise_offset": 0.1, "debiased": True},
        {"ss_debiased_estimation": "True", "ss_max_train_steps": "6", "ss_noise_offset": "0.1", "ss_steps": "KEPT"},
    ),
    "PiSSA": (
        {"init": "pissa", "alpha": 2.0},
        {"ss_network_alpha": "4.0", "ss_network_dim": "4"},
    ),
    "the text encoders alone": (
        {
            "train_unet": False,
            "learning_rate": 1e-4,
            "blocks": "",
            "text_encoder_2_learning_rate": 1e-4,
            "new_tokens": "number",
        },
        {
            "modelspec.trigger_phrase": "zxq, number",
            "ss_datasets": PLAIN["ss_datasets"].replace('"zxq"', '"zxq, number"'),
            "ss_learning_rate": "0.0001",
            "ss_network_args": '{"target_modules":"attention"}',
            "ss_tag_frequency": PLAIN["ss_tag_frequency"].replace('{"picture ', '{"number":4,"picture '),
            "ss_text_encoder_lr": "[0.0, 0.0001]",
            "ss_unet_lr": "None",
        },
    ),
}


@pytest.fixture
def four(pictures: Path) -> CaptionDataset:
    return load(pictures, trigger_word="zxq", validation_percent=20, repeats=3)


@pytest.mark.parametrize("name", CASES)
def test_the_metadata_of_a_lora(run: Train, micro_base: SDXLBase, four: CaptionDataset, name: str) -> None:
    changes, expected = CASES[name]
    result = run(replace(SMALL, **changes), dataset=four)
    found = read_lora(result.lora_path).metadata
    content = hashlib.sha256(weights_of(result.lora_path)).hexdigest()
    wanted = {
        **PLAIN,
        **expected,
        "ss_sd_model_hash": micro_base.fingerprint[:8],
        "ss_new_sd_model_hash": micro_base.fingerprint,
        "sshs_model_hash": content,
        "modelspec.hash_sha256": f"0x{content}",
    }
    if result.report.kept:
        wanted["ss_steps"] = re.search(r"adapter of step (\d+)", result.report.kept)[1]  # type: ignore[index]
    assert found == wanted


def weights_of(path: Path) -> bytes:
    """A safetensors file without its header."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def test_a_checkpoint_is_named_by_the_hash_of_its_file(
    run: Train, micro_checkpoint: Path, micro_sdxl: Path, four: CaptionDataset
) -> None:
    found = read_lora(
        run(base=open_base(micro_checkpoint, "fp32", configs=micro_sdxl), dataset=four).lora_path
    ).metadata
    assert found["ss_new_sd_model_hash"] == file_sha256(micro_checkpoint)
    assert found["ss_sd_model_hash"] == file_sha256(micro_checkpoint)[:8]


def test_words_are_counted_where_they_are(run: Train, tmp_path: Path) -> None:
    """A trigger word of one folder, and a new token, in the captions of another."""
    mine, yours = (
        captioned(tmp_path / name, texts) for name, texts in {"mine": ["a cat", "ohwx cat"], "yours": ["a dog"]}.items()
    )
    dataset = load_caption_dataset(yours, DatasetConfig(resolution=64), load(mine, trigger_word="zxq"))
    config = replace(SMALL, steps=1, new_tokens="ohwx")
    found = read_lora(run(config, dataset=dataset).lora_path).metadata
    assert json.loads(found["ss_tag_frequency"]) == {
        "1_mine": {"zxq": 2, "ohwx": 1, "a cat": 1, "ohwx cat": 1},
        "1_yours": {"a dog": 1},
    }


def captioned(folder: Path, captions: Sequence[str]) -> Path:
    folder.mkdir()
    for number, caption in enumerate(captions):
        Image.new("RGB", (64, 64), (number, 0, len(caption))).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return folder


# A report


def test_the_report_of_a_run(run: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is taken, a file is skipped, a caption truncated, memory runs out and a loss is not a number."""
    folder = captioned(tmp_path / "mine", ["a cat", "a dog", "a cat " * 40])
    for name, size in {"wide": (128, 64), "tall": (64, 128)}.items():
        Image.new("RGB", size).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name)
    (folder / "broken.png").write_bytes(b"broken")
    held_out = load(captioned(tmp_path / "held out", ["a bird"]))
    classes = load_caption_dataset(
        captioned(tmp_path / "classes", ["an animal"] * 2),
        DatasetConfig(resolution=64, is_regularisation=True),
        load(folder, trigger_word="zxq"),
    )
    (tmp_path / "a/loras").mkdir(parents=True)
    (tmp_path / "a/loras/small.safetensors").write_bytes(b"another LoRA")
    seen: list[StepReport] = []

    def losses(own: Losses, learner: TrainableSDXL, batch: Batch, step: int) -> torch.Tensor:
        if len(batch.latents) > 1:
            raise torch.OutOfMemoryError("injected")
        return own(learner, batch) * (torch.nan if step == 2 else 1)

    change_losses(monkeypatch, losses)
    config = replace(
        SMALL,
        steps=5,
        text_encoder_learning_rate=1e-3,
        new_tokens="zxq",
        adapter="lora",
        validate_every=5,
        keep_best="validation_loss",
    )
    result = run(config, dataset=classes, validation=held_out, on_step=seen.append)
    steps = [report for report in seen if report.phase == "training"]
    with open(result.loss_chart.with_name("metrics.csv"), newline="") as file:
        validated = [float(row["validation_loss"]) for row in csv.DictReader(file) if row["validation_loss"]]
    assert vars(result.report) == {
        "lora": "small_00002.safetensors",
        "base": "micro-sdxl",
        "images": 5,
        "steps": steps[-1].done,
        "epochs": 1.0,
        "loss": pytest.approx(steps[-1].smoothed),
        "modules": len({name.rpartition(".lora_")[0] for name in load_file(result.lora_path) if ".lora_down" in name}),
        "adapter": "lora",
        "rank": 2,
        "trigger_words": ["zxq"],
        "memory": Whole(
            r"float32, gradient checkpointing off, 2 images a pass: about .* GB needed of .* GB free; "
            r"latents and prompts in main memory up to .* GB; "
            r"out of memory at step \d: from here 1 image a pass, not 2"
        ),
        "skipped_steps": [3],
        "skipped_files": [Whole(r"mine/broken\.png: cannot be used: it is not an image .*")],
        "regularisation_images": 2,
        "cut_captions": ["2.png: truncated: cat a cat a cat a cat"],
        "text_encoders": "text_encoder and text_encoder_2 read the captions in every step, without the cache",
        "new_tokens": {"zxq": "embedding:small_00002-zxq in prompts of ComfyUI's own nodes"},
        "small_batches": Whole("batch_size is 2, but the mean batch has 1.4 images, because .*"),
        "note": "the name small was taken, so this LoRA is small_00002",
        "without_effect": None,  # test_history.py
        "stopped": None,  # the rest of these: test_resume.py and test_evaluator.py
        "early_stopping": None,
        "continued": None,
        "validation_loss": pytest.approx(validated[-1]),
        "validation_loss_before": pytest.approx(validated[0]),
        "kept": "the file has the adapter of step 5, the best by validation_loss",
        "check_captions": None,  # test_image_losses.py
        "reused": False,
        "clip_scores": None,
    }


@dataclass(frozen=True, eq=False)
class Whole:
    """Equal to texts that the pattern matches from end to end."""

    pattern: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and re.fullmatch(self.pattern, other) is not None


# A PNG


def test_the_parameters_of_a_png(
    micro_base: SDXLBase, micro_checkpoint: Path, micro_sdxl: Path, tmp_path: Path
) -> None:
    lora = weighted(write_lora(tmp_path / "style.safetensors", micro_base, 1), 0.8, 0.5)
    net = save_single(tmp_path / "edges.safetensors", random_net(micro_base, 1))
    config = settings(
        negative_prompt="blurry", steps=3, guidance=4.5, sampler="euler", scheduler="beta", seed=7, count=2, width=80,
        denoise=0.5, hires_scale=1.5, hires_denoise=0.4, hires_steps=2,
    )  # fmt: skip
    controls = [control(net, strength=0.6, start_percent=0.1, end_percent=0.9)]
    images = draw(
        open_base(micro_checkpoint, "fp32", configs=micro_sdxl),
        config,
        [lora],
        starts=start_images(config, [picture()]),
        controls=controls,
        graph={},
    )
    hashes = {
        name: file_sha256(path)[:10] for name, path in {"base": micro_checkpoint, "lora": lora.path, "net": net}.items()
    }
    for number, image in enumerate(images):
        assert image.texts["parameters"].split("\n") == [
            "a red circle <lora:style:0.5:0.8>",
            "Negative prompt: blurry",
            f"Steps: 3, Sampler: Euler, Schedule type: Beta, CFG scale: 4.5, Seed: {7 + number}, Size: 80x64, "
            f"Model hash: {hashes['base']}, Model: micro-single, Denoising strength: 0.4, Hires upscale: 1.5, "
            f'Hires steps: 2, Hires upscaler: Lanczos, ControlNet 0: "Module: none, Model: edges [{hashes["net"]}], '
            "Weight: 0.6, Resize Mode: Crop and Resize, Guidance Start: 0.1, Guidance End: 0.9, Control Mode: "
            f'Balanced", Hashes: {{"model": "{hashes["base"]}", "lora:style": "{hashes["lora"]}"}}',
        ]


def test_a_png_does_not_name_what_had_no_effect(micro_base: SDXLBase, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "style.safetensors", micro_base, 1)
    net = save_single(tmp_path / "edges.safetensors", random_net(micro_base, 1))
    config = settings(negative_prompt="blurry", guidance=1.0)
    (image,) = draw(micro_base, config, [weighted(lora, 0, 0)], controls=[control(net, strength=0.0)], graph={})
    assert image.texts["parameters"] == (
        "a red circle\nSteps: 3, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 1, Seed: 5, Size: 64x64, "
        "Model: micro-sdxl"
    )


def test_a_png_of_a_distilled_unet_has_no_negative_prompt(micro_base: SDXLBase, micro_copy: Callable[[], Path]) -> None:
    folder = micro_copy()
    edit_json(folder / "unet" / "config.json", time_cond_proj_dim=12)
    base = replace(micro_base, path=folder, configs=folder)
    text = PngTexts(base, settings(negative_prompt="blurry", guidance=7.0)).parameters("a", 1)
    assert "blurry" not in text
    assert "blurry" in PngTexts(micro_base, settings(negative_prompt="blurry", guidance=7.0)).parameters("a", 1)
