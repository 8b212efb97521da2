"""Trains a LoRA: from captioned images to a LoRA file with its samples and its run folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..dataset.trained_images import write_trained_images
from ..files import write_text_atomic
from ..lora.files import read_lora
from ..lora.modules import LoRAFile, LoRAModule, with_dora_scale
from ..lora.writing import kohya_state_dict
from ..runtime.distributed import Processes
from ..sdxl.base import SDXLBase, load_part, predicting, require_predictable, require_sdxl, require_vae
from ..settings import without_effect
from .config.captions import tokens_of
from .config.loss import LAST_TIMESTEP
from .config.train_config import TrainConfig
from .data.batches import require_new_tokens
from .data.class_images import with_class_images
from .image_report import CHART, captions_to_check, rated_images, write_image_losses
from .job import RunContext, TrainingJob
from .loop import train_adapter
from .model.base_weights import require_format
from .monitor.journal import Journal
from .monitor.progress import StepReport
from .monitor.sample_images import Samples
from .monitor.validation import require_evaluable
from .optim.optimizers import require_library
from .outputs import RunOutputs
from .report import RunReport, make_report, save_settings
from .run.runs import Run, claim_run, related_runs
from .run_length import starting_point, with_steps

log = logging.getLogger("sdxl_lora")


@dataclass(frozen=True)
class TrainResult:
    """The result of a run. samples are uint8 [H, W, 3]; state_dict has the UNet's weights by kohya's keys.

    image_chart is the chart of each image's loss, if that was measured.
    """

    lora_name: str
    lora_path: Path
    state_dict: dict[str, Tensor]
    loss_chart: Path
    image_chart: Path | None
    samples: list[np.ndarray]
    report: RunReport
    reused: bool


def train(job: TrainingJob, context: RunContext) -> TrainResult:
    """Trains a LoRA, resumes an interrupted run, or finds the finished run with the same settings and images.

    Raises what `context.on_step` raises, after a checkpoint; OSError if a folder cannot be written to; ValueError for
    data that cannot be trained on; Diverged if losses are not finite; torch.OutOfMemoryError if the GPU is too small.
    """
    job = _checked(job, context.device)
    processes = context.processes
    for note in without_effect(job.config).values():
        log.warning(note)
    require_work_for_all(job.config, processes)
    with _claimed(job, context) as run:
        context.on_run(run.name)
        outputs = RunOutputs(run, job, context)
        tokens = [run.embedding(token) for token in tokens_of(job.config)]
        reused = processes.share(run.finished and all(file.is_file() for file in tokens))
        if not reused:
            _train_and_save(run, job, context)
            processes.wait()
        samples = _final_samples(outputs)
        report = replace(RunReport.read(run.folder / "report.json"), reused=reused)
        if job.config.clip_model and samples.pixels:
            report = replace(report, clip_scores=list(samples.clip_scores))
        return TrainResult(
            lora_name=run.lora_path.name,
            lora_path=run.lora_path,
            state_dict=_comfyui_weights(run.lora_path, job.base),
            loss_chart=run.folder / "loss.png",
            image_chart=chart if (chart := run.folder / CHART).is_file() else None,
            samples=samples.pixels,
            report=report,
            reused=reused,
        )


def _checked(job: TrainingJob, device: torch.device) -> TrainingJob:
    """The job with its base as it is trained and its length in steps. Raises ValueError for what cannot be trained."""
    dataset, config = job.dataset, job.config
    if not dataset.entries:
        if dataset.regularisation:
            raise ValueError(
                f"dataset {dataset.name} has only regularisation images: connect a dataset of training images, too"
            )
        raise ValueError(f"dataset {dataset.name} has no images to train on")
    require_sdxl(job.base, "training")
    require_vae(job.base)
    require_evaluable(config, dataset)
    if config.prior_weight != 1 and not (dataset.regularisation or config.class_prompt):
        raise ValueError(
            f"prior_weight is {config.prior_weight} and there are no regularisation images: add some, give a "
            "class_prompt, or set it back to 1"
        )
    require_new_tokens(config, [caption for entry in dataset.entries for caption in entry.captions])
    job = replace(job, base=as_trained(job.base, config))
    require_library(config)
    require_format(config.base_weights, device)
    return with_steps(job)


@contextmanager
def _claimed(job: TrainingJob, context: RunContext) -> Iterator[Run]:
    """The run that the first process claims; the other processes use the same one."""
    processes = context.processes
    fingerprints = job.fingerprint, job.earlier_fingerprints
    claim = claim_run(context.folders, job.config, *fingerprints) if processes.is_first else nullcontext()
    with claim as claimed:
        run = processes.share(claimed)
        assert run
        yield run


def _train_and_save(run: Run, job: TrainingJob, context: RunContext) -> None:
    processes, config = context.processes, job.config
    with processes.one_after_the_other():
        shown = with_class_images(
            job,
            run.folder / "class_images",
            context,
            lambda done, total: context.on_step(StepReport("generating class images", done, total)),
        )
    start = starting_point(related_runs(context.folders, run, config.lora_name), config)
    if processes.is_first:
        write_trained_images(run.folder, shown.dataset)
    outputs = RunOutputs(run, shown, context)
    with closing(Journal(run.folder if processes.is_first else None, run.name, config.tensorboard)) as journal:
        trained = train_adapter(shown, context, outputs, journal, start)
    if not processes.is_first:
        return
    outputs.write_result(trained.learned, trained.step)
    report = make_report(run, shown, trained)
    if losses := trained.state.image_losses:
        images = rated_images(shown.dataset.entries, losses)
        write_image_losses(run.folder, images)
        report = replace(report, check_captions=captions_to_check(images) or None)
    facts = {
        "fingerprint": job.fingerprint,
        "base": job.base.fingerprint,
        "dataset": job.dataset.fingerprint,
        "epochs": report.epochs,
        "seconds": round(trained.state.seconds, 1),
        "resumed": trained.state.resumed,
        "device": str(context.device),
    }
    save_settings(run, shown, facts)
    report.write(run.folder / "report.json")
    write_text_atomic(run.folder / "finished", job.fingerprint)


def _final_samples(outputs: RunOutputs) -> Samples:
    """The samples of the finished LoRA, from the first process; none without sample prompts."""
    context = outputs.context
    if not outputs.job.config.sample_prompts or not context.processes.is_first:
        return Samples([], ())
    return outputs.renderer.of_file(outputs.run.lora_path, context.owner, context.on_step)


def _comfyui_weights(path: Path, base: SDXLBase) -> dict[str, Tensor]:
    """The file's UNet by kohya's keys. For that, a DoRA in peft's form needs the norms of the base's weights."""
    file = LoRAFile(unet=read_lora(path).unet)
    if any(isinstance(module, LoRAModule) and module.magnitude is not None for module in file.unet.values()):
        unet: Any = load_part(base, "unet", torch.float32)
        file.unet = {
            name: with_dora_scale(module, unet.get_submodule(name).weight.detach())
            for name, module in file.unet.items()
            if isinstance(module, LoRAModule)
        }
    return kohya_state_dict(file, torch.float32)


def as_trained(base: SDXLBase, config: TrainConfig) -> SDXLBase:
    """The base with the prediction type and noise schedule of `config`, where it overrides the base's own.

    Raises ValueError for epsilon prediction at the timestep of zero terminal SNR (see require_predictable).
    """
    base = predicting(base, config.prediction, config.zero_terminal_snr)
    if config.timestep_max == LAST_TIMESTEP:
        require_predictable(base, f" or timestep_max to {LAST_TIMESTEP - 1}")
    return base


def require_work_for_all(config: TrainConfig, processes: Processes) -> None:
    """Raises ValueError if an update has fewer images than there are processes."""
    images = config.batch_size * config.gradient_accumulation
    if images < processes.count:
        raise ValueError(
            f"an update has {images} images (batch_size {config.batch_size}, gradient_accumulation "
            f"{config.gradient_accumulation}) and there are {processes.count} processes: raise one of the two"
        )
