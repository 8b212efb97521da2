"""The metadata of a trained LoRA: kohya's `ss_*` and Stability's `modelspec.*`, as galleries and loaders read them.

It follows from the run's settings and data only, without times, paths or hosts, so that equal runs give equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..dataset.caption_dataset import CaptionEntry
from ..dataset.caption_text import contains_word
from ..files import canonical_json
from ..lora.metadata import IMPLEMENTATIONS, tag_counts
from ..sdxl.precision import DTYPES
from ..text.encoding import CHUNK_TOKENS
from .config.train_config import TrainConfig
from .job import TrainingJob
from .optim.optimizers import CLASSES, optimizer_settings


@dataclass(frozen=True)
class FolderFacts:
    """The training images of a folder: their number, their repeats, and how often each tag occurs."""

    images: int
    repeats: int = 1
    tags: Mapping[str, int] = field(default_factory=dict)


def lora_metadata(job: TrainingJob, name: str, steps: int, dtype: torch.dtype) -> dict[str, str]:
    """The metadata of the LoRA `name` after `steps` updates, computed at precision `dtype`."""
    base, config = job.base, job.config
    v_prediction = base.prediction_type == "v_prediction"
    # Model sites know a checkpoint by the SHA-256 of its file; a folder has none.
    base_hash = dict(base.part_hashes)["unet"] if base.layout == "single_file" else base.fingerprint
    precision = next(option for option, computed in DTYPES.items() if computed == dtype)
    values: dict[str, object] = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_output_name": name,
        "ss_sd_model_name": base.name,
        "ss_sd_model_hash": base_hash[:8],
        "ss_new_sd_model_hash": base_hash,
        "ss_v_parameterization": v_prediction,
        "ss_zero_terminal_snr": base.zero_terminal_snr,
        "ss_mixed_precision": "no" if precision == "fp32" else precision,
        "ss_steps": steps,
        **_dataset_values(job),
        "ss_num_reg_images": len(job.dataset.regularisation),
        **_caption_values(config),
        **_training_values(config),
        **_loss_values(config),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": IMPLEMENTATIONS[config.save_format],
        "modelspec.title": name,
        "modelspec.resolution": f"{job.resolution}x{job.resolution}",
        "modelspec.prediction_type": "v" if v_prediction else "epsilon",
    }
    if job.trigger_words:
        values["modelspec.trigger_phrase"] = ", ".join(job.trigger_words)
    return {key: str(value) for key, value in values.items()}


def _training_values(config: TrainConfig) -> dict[str, object]:
    arguments = ",".join(f"{name}={value}" for name, value in optimizer_settings(config).items())
    return {
        **_network_values(config),
        "ss_caption_dropout_rate": config.caption_dropout,
        "ss_max_train_steps": config.steps,
        "ss_learning_rate": config.leading_rate,
        "ss_unet_lr": config.learning_rate if config.train_unet else None,
        **_text_encoder_values(config),
        "ss_lr_scheduler": config.lr_schedule,
        "ss_lr_warmup_steps": config.lr_warmup_steps,
        "ss_optimizer": f"{CLASSES[config.optimizer]}({arguments})",
        "ss_max_grad_norm": config.max_grad_norm,
        "ss_gradient_accumulation_steps": config.gradient_accumulation,
        "ss_total_batch_size": config.batch_size * config.gradient_accumulation,
        "ss_seed": config.seed,
    }


def _text_encoder_values(config: TrainConfig) -> dict[str, object]:
    rates = [config.text_encoder_learning_rate, config.text_encoder_2_learning_rate]
    return {"ss_text_encoder_lr": rates} if any(rates) else {}


def _loss_values(config: TrainConfig) -> dict[str, object]:
    """The settings in use, by kohya's names where it has one."""
    values: dict[str, object] = {
        "ss_loss_type": config.loss if config.loss != "mse" else None,
        "ss_huber_c": config.huber_delta if config.loss != "mse" else None,
        "ss_min_snr_gamma": config.snr_gamma,
        "ss_debiased_estimation": config.debiased,
        "ss_noise_offset": config.noise_offset,
        "ss_multires_noise_iterations": config.multires_noise_iterations,
        "ss_multires_noise_discount": config.multires_noise_discount if config.multires_noise_iterations else None,
        "ss_ip_noise_gamma": config.input_perturbation,
    }
    return {key: value for key, value in values.items() if value}


def _caption_values(config: TrainConfig) -> dict[str, object]:
    """The settings in use, by kohya's names."""
    values: dict[str, object] = {
        "ss_shuffle_caption": config.shuffle_tags,
        "ss_keep_tokens": config.keep_tags,
        "ss_caption_tag_dropout_rate": config.tag_dropout,
        "ss_max_token_length": CHUNK_TOKENS * config.caption_chunks if config.caption_chunks > 1 else None,
        "ss_masked_loss": config.masked_loss,
        "ss_prior_loss_weight": str(config.prior_weight) if config.prior_weight != 1 else None,
    }
    return {key: value for key, value in values.items() if value}


def _network_values(config: TrainConfig) -> dict[str, object]:
    """The adapter: kohya's own network for LoRA, LyCORIS for all others. PiSSA doubles rank and alpha in the file."""
    doubled = 2 if config.init == "pissa" else 1
    arguments: dict[str, str] = {"target_modules": config.target_modules}
    if config.adapter != "lora":
        arguments["algo"] = "lora" if config.adapter == "dora" else config.adapter
    if config.adapter == "dora":
        arguments |= {"dora_wd": "True", "wd_on_output": "True"}
    if config.use_rslora:
        arguments["rs_lora"] = "True"
    chosen = ("rank_dropout", "module_dropout", "blocks", "block_ranks", "block_learning_rates")
    arguments |= {option: str(getattr(config, option)) for option in chosen if getattr(config, option)}
    if config.lora_plus_ratio != 1:
        arguments["loraplus_lr_ratio"] = str(config.lora_plus_ratio)
    return {
        "ss_network_module": "networks.lora" if config.adapter == "lora" else "lycoris.kohya",
        "ss_network_dim": config.rank * doubled,
        "ss_network_alpha": config.alpha * doubled,
        "ss_network_dropout": config.dropout,
        "ss_network_args": canonical_json(arguments),
    }


def _dataset_values(job: TrainingJob) -> dict[str, object]:
    folders, trigger_words, resolution = _folders(job), job.trigger_words, job.resolution
    shown = sum(folder.images * folder.repeats for folder in folders.values())
    tags = {name: folder.tags for name, folder in folders.items()}
    classes = ", ".join(trigger_words)
    dataset = {
        "is_dreambooth": True,
        "batch_size_per_device": job.config.batch_size,
        "num_train_images": shown,
        "resolution": [resolution, resolution],
        "enable_bucket": True,
        "subsets": [
            {"num_repeats": folder.repeats, "img_count": folder.images, "image_dir": name, "class_tokens": classes}
            for name, folder in folders.items()
        ],
    }
    counts = {name: {"n_repeats": folder.repeats, "img_count": folder.images} for name, folder in folders.items()}
    return {
        "ss_resolution": f"({resolution}, {resolution})",
        "ss_enable_bucket": True,
        "ss_num_train_images": shown,
        "ss_dataset_dirs": canonical_json(counts),
        "ss_datasets": canonical_json([dataset]),
        "ss_tag_frequency": canonical_json(tags),
    }


def _folders(job: TrainingJob) -> dict[str, FolderFacts]:
    """The training images by kohya's names of folders, `3_cat`; by the dataset's name if there is only one folder."""
    groups: dict[tuple[int, str], list[CaptionEntry]] = {}
    for entry in job.dataset.entries:
        groups.setdefault((entry.repeats, entry.image.parent.name), []).append(entry)
    facts = {
        f"{repeats}_{name.removeprefix(f'{repeats}_')}": FolderFacts(
            len(entries), repeats, _tags(entries, job.trigger_words)
        )
        for (repeats, name), entries in groups.items()
    }
    return facts if len(facts) > 1 else {job.dataset.name: next(iter(facts.values()))}


def _tags(entries: Sequence[CaptionEntry], trigger_words: Sequence[str]) -> dict[str, int]:
    """How many images have each trigger word, also within sentences, and how many captions have each tag."""
    words = {word: sum(_has(entry, word) for entry in entries) for word in trigger_words}
    tags = tag_counts(caption for entry in entries for caption in entry.captions)
    return {word: count for word, count in words.items() if count} | tags


def _has(entry: CaptionEntry, word: str) -> bool:
    return any(contains_word(caption, word) for caption in entry.captions)
