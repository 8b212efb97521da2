"""The whole job: captioned images in, a LoRA file, its samples and its run folder out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..dataset.caption_dataset import CaptionDataset, CaptionEntry, with_validation
from ..files import write_text_atomic
from ..lora.files import read_lora, write_lora
from ..lora.metadata import tag_counts
from ..lora.modules import LoRAFile, LoRAModule, with_dora_scale
from ..lora.writing import kohya_state_dict
from ..runtime.distributed import Processes
from ..runtime.loaded_parts import LoadedParts
from ..sdxl.base import SDXLBase, load_part, predicting
from ..sdxl.precision import DTYPES, resolve_dtype
from ..text.embedding_files import write_embedding
from .config.loss import LAST_TIMESTEP
from .config.train_config import TrainConfig
from .data.batches import all_trigger_words, require_shown
from .data.class_images import with_class_images
from .loop import train_adapter
from .lora_metadata import FolderFacts, lora_metadata
from .monitor.journal import Journal
from .monitor.progress import OnStep, StepReport
from .monitor.sample_images import Sampler, Samples
from .monitor.validation import require_lookable
from .optim.optimizers import require_library
from .report import make_report
from .run.runs import Run, RunFolders, claim_run, related_runs, run_fingerprint, save_settings
from .run_length import starting_point, with_steps


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves. samples are uint8 [H, W, 3]; state_dict has kohya's UNet keys."""

    lora_name: str
    lora_path: Path
    state_dict: dict[str, Tensor]
    loss_chart: Path
    samples: list[np.ndarray]
    report: dict[str, Any]
    reused: bool


def train(
    base: SDXLBase,
    dataset: CaptionDataset,
    config: TrainConfig,
    *,
    folders: RunFolders,
    device: torch.device,
    on_step: OnStep = lambda report: None,
    should_stop: Callable[[], bool] = lambda: False,
    parts: LoadedParts | None = None,
    validation: CaptionDataset | None = None,
) -> TrainResult:
    """Trains, or continues, or finds the same run finished. `parts` owns the weights that draw images.

    The pictures of `validation` are looked at beside those that `dataset` holds out.

    Raises what `on_step` raises (after a checkpoint), OSError when a folder cannot be written, ValueError for data that
    cannot be trained on, Diverged when losses are not finite, torch.OutOfMemoryError when the GPU is too small.
    """
    if not dataset.entries:
        if dataset.regularisation:
            raise ValueError(f"dataset {dataset.name} has only regularisation images: connect those to train on, too")
        raise ValueError(f"dataset {dataset.name} has no images to train on")
    if validation:
        dataset = with_validation(dataset, validation)
    require_lookable(config, dataset)
    if config.prior_weight != 1 and not (dataset.regularisation or config.class_prompt):
        raise ValueError(
            f"prior_weight is {config.prior_weight} and there are no regularisation images: add some, give a "
            "class_prompt, or set it back to 1"
        )
    require_shown(config, [caption for entry in dataset.entries for caption in entry.captions])
    parts = parts or LoadedParts(device, offload=True)
    base = as_trained(base, config)
    require_library(config)
    config = with_steps(config, dataset)
    processes = Processes.launched(device)
    require_work_for_all(config, processes)
    fingerprint = run_fingerprint(base, dataset, config)
    with _claimed(processes, folders, config, fingerprint) as run:
        reused = processes.share(run.finished)
        if not reused:
            with processes.one_after_the_other():
                shown = with_class_images(
                    base,
                    dataset,
                    config,
                    run.folder / "class_images",
                    parts=parts,
                    cache=folders.cache,
                    on_step=lambda done, total: on_step(StepReport("drawing class images", done, total)),
                )
            _train_and_save(run, base, shown, config, fingerprint, folders, device, on_step, should_stop, processes)
            processes.wait()
        report = json.loads((run.folder / "report.json").read_text(encoding="utf-8"))
        report["reused"] = reused
        draws = bool(config.sample_prompts) and processes.is_first
        samples = _final_samples(run, base, dataset, config, folders, parts, on_step) if draws else Samples([], ())
        if config.clip_model and samples.pixels:
            report["clip_scores"] = list(samples.clip_scores)
        return TrainResult(
            lora_name=run.lora_path.name,
            lora_path=run.lora_path,
            state_dict=_comfyui_weights(run.lora_path, base),
            loss_chart=run.folder / "loss.png",
            samples=samples.pixels,
            report=report,
            reused=reused,
        )


@contextmanager
def _claimed(processes: Processes, folders: RunFolders, config: TrainConfig, fingerprint: str) -> Iterator[Run]:
    """The run that the first process claims; the others follow it there."""
    with claim_run(folders, config, fingerprint) if processes.is_first else nullcontext() as claimed:
        run = processes.share(claimed)
        assert run
        yield run


def _train_and_save(
    run: Run,
    base: SDXLBase,
    dataset: CaptionDataset,
    config: TrainConfig,
    fingerprint: str,
    folders: RunFolders,
    device: torch.device,
    on_step: OnStep,
    should_stop: Callable[[], bool],
    processes: Processes,
) -> None:
    computed, dtype = resolve_dtype(config.precision, device), DTYPES[config.save_dtype]
    sampler = _sampler(run, base, dataset, config, folders)

    def lora(learned: LoRAFile, steps: int) -> LoRAFile:
        return replace(learned, metadata=_metadata(run.name, base, dataset, config, steps, computed))

    with closing(Journal(run.folder if processes.is_first else None, run.name, config.tensorboard)) as journal:
        trained = train_adapter(
            base,
            dataset,
            config,
            cache=folders.cache,
            checkpoints=run.checkpoints,
            start=starting_point(related_runs(folders, run, config.lora_name), config),
            write_adapter=lambda path, learned, steps: write_lora(
                path, lora(learned, steps), torch.float32, config.save_format
            ),
            sample=lambda learned, step, on_step: sampler.of_step(
                step, lambda path: write_lora(path, lora(learned, step), dtype, config.save_format), device, on_step
            ),
            journal=journal,
            device=device,
            on_step=on_step,
            should_stop=should_stop,
            processes=processes,
        )
    if not processes.is_first:
        return
    finished = lora(trained.learned, trained.step)
    write_lora(run.lora_path, finished, dtype, config.save_format)
    for token, vectors in finished.tokens.items():
        write_embedding(run.embedding(token), vectors)
    report = make_report(run, base, dataset, config, trained)
    facts = {
        "fingerprint": fingerprint,
        "base": base.fingerprint,
        "dataset": dataset.fingerprint,
        "epochs": report["epochs"],
        "seconds": round(trained.state.seconds, 1),
        "resumed": trained.state.resumed,
        "device": str(device),
    }
    save_settings(run, base, dataset, config, facts)
    write_text_atomic(run.folder / "report.json", json.dumps(report, indent=2))
    write_text_atomic(run.folder / "finished", fingerprint)


def _folders(dataset: CaptionDataset) -> dict[str, FolderFacts]:
    """The training images by kohya's names of folders, `3_cat`; by the data set's where there is only one."""
    groups: dict[tuple[int, str], list[CaptionEntry]] = {}
    for entry in dataset.entries:
        groups.setdefault((entry.repeats, entry.image.parent.name), []).append(entry)
    facts = {
        f"{repeats}_{name.removeprefix(f'{repeats}_')}": FolderFacts(
            len(entries), repeats, tag_counts(entry.caption for entry in entries)
        )
        for (repeats, name), entries in groups.items()
    }
    return facts if len(facts) > 1 else {dataset.name: next(iter(facts.values()))}


def _metadata(
    name: str, base: SDXLBase, dataset: CaptionDataset, config: TrainConfig, steps: int, dtype: torch.dtype
) -> dict[str, str]:
    precision: Any = next(option for option, computed in DTYPES.items() if computed == dtype)
    return lora_metadata(
        config,
        name=name,
        base_name=base.name,
        base_hash=base.fingerprint,
        prediction_type=base.prediction_type,
        zero_terminal_snr=base.zero_terminal_snr,
        precision=precision,
        resolution=max(entry.resolution for entry in dataset.entries),
        folders=_folders(dataset),
        trigger_words=all_trigger_words(dataset, config),
        steps=steps,
        regularisation_images=len(dataset.regularisation),
    )


def _comfyui_weights(path: Path, base: SDXLBase) -> dict[str, Tensor]:
    """The file's UNet in kohya's keys. A DoRA in peft's form has to be measured against the base for that."""
    file = LoRAFile(unet=read_lora(path).unet)
    if any(isinstance(module, LoRAModule) and module.magnitude is not None for module in file.unet.values()):
        unet: Any = load_part(base, "unet", torch.float32)
        file.unet = {
            name: with_dora_scale(module, unet.get_submodule(name).weight.detach())
            for name, module in file.unet.items()
            if isinstance(module, LoRAModule)
        }
    return kohya_state_dict(file, torch.float32)


def _sampler(run: Run, base: SDXLBase, dataset: CaptionDataset, config: TrainConfig, folders: RunFolders) -> Sampler:
    side = max(entry.resolution for entry in dataset.entries)
    return Sampler(base, config, side, folders.cache, run.folder / "samples")


def _final_samples(
    run: Run,
    base: SDXLBase,
    dataset: CaptionDataset,
    config: TrainConfig,
    folders: RunFolders,
    parts: LoadedParts,
    on_step: OnStep,
) -> Samples:
    return _sampler(run, base, dataset, config, folders).of_file(run.lora_path, parts, on_step)


def as_trained(base: SDXLBase, config: TrainConfig) -> SDXLBase:
    """The base with the prediction type and the noise schedule of `config`, where that overrides the base's own.

    Raises ValueError for epsilon at zero terminal SNR (Lin et al., arXiv 2305.08891, section 3.1): at the last timestep
    the input is the noise itself, so nothing of the image can be learned there, nor drawn from there.
    """
    base = predicting(base, config.prediction, config.zero_terminal_snr)
    if base.prediction_type == "epsilon" and base.zero_terminal_snr and config.timestep_max == LAST_TIMESTEP:
        raise ValueError(
            f"prediction is {config.prediction!r} and zero_terminal_snr is {config.zero_terminal_snr!r}, so "
            f"{base.name} would predict epsilon where there is only noise: set prediction to v_prediction if the base "
            f"was trained so, else zero_terminal_snr to off or timestep_max to {LAST_TIMESTEP - 1}"
        )
    return base


def require_work_for_all(config: TrainConfig, processes: Processes) -> None:
    """Raises ValueError if an update has fewer images than there are processes."""
    images = config.batch_size * config.gradient_accumulation
    if images < processes.count:
        raise ValueError(
            f"an update has {images} images (batch_size {config.batch_size}, gradient_accumulation "
            f"{config.gradient_accumulation}) and there are {processes.count} processes: raise one of the two"
        )
