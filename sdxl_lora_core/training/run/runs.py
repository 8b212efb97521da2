"""The names, folders and fingerprints of training runs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cache.folders import CacheFolders
from ...dataset.caption_dataset import CaptionDataset
from ...dataset.caption_text import pinned_tags, split_tags, tags_with
from ...files import (
    claim_name,
    file_sha256,
    json_sha256,
    leftovers_of,
    require_file_names,
    write_text_atomic,
)
from ...safetensors_file import read_header
from ...sdxl.base import SDXLBase, prediction_arguments
from ...settings import without_later_defaults
from ...vision.model_folder import folder_fingerprint
from ..config.captions import tokens_of
from ..config.train_config import TrainConfig
from .checkpoints import Checkpoints

if TYPE_CHECKING:
    from filelock import BaseFileLock

# Raised when noise, order, initialisation or the rounding of a step change, so that old runs are not continued.
# Finished runs of earlier versions are still found.
RANDOMNESS_VERSION = 2


@dataclass(frozen=True)
class RunFolders:
    """The folders of a run. `taken` says whether a LoRA's file name exists in any folder of LoRAs."""

    loras: Path
    runs: Path
    cache: CacheFolders
    taken: Callable[[str], bool]


@dataclass(frozen=True)
class Run:
    """A run: its name, its folder, and the identity by which it is found again: fingerprint, length and format."""

    name: str
    folder: Path
    lora_path: Path
    identity: dict[str, Any]

    @property
    def finished(self) -> bool:
        """Whether all of its results are there and whole; if not, they are written again from the last checkpoint."""
        if not (self.folder / "finished").exists() or not (self.folder / "loss.png").exists():
            return False
        try:
            read_header(self.lora_path)
            json.loads((self.folder / "report.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return True

    @property
    def known(self) -> dict[str, Any] | None:
        """The identity stored in its folder; None if no step was taken there."""
        begun = self.checkpoints.exist or self.finished or (self.folder / "report.json").exists()
        return _identity(self.folder) if begun else None

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.folder / "checkpoints", self.identity["fingerprint"])

    def embedding(self, token: str) -> Path:
        """The file of a single new token, in the folder `embeddings` beside that of the LoRAs."""
        return self.lora_path.parent.with_name("embeddings") / f"{self.name}-{token}.safetensors"

    @property
    def step_loras(self) -> Path:
        """The folder of LoRAs of earlier steps, beside the finished one."""
        return self.lora_path.with_suffix("")

    def lora_of_step(self, step: int) -> Path:
        return self.step_loras / f"step-{step:06d}.safetensors"

    def sweep(self) -> None:
        """Deletes temporary files of a killed process. Nobody else writes under this name."""
        self.checkpoints.sweep()
        step_loras = self.step_loras.glob(".*.tmp")
        for leftover in (*self.folder.glob(".*.tmp"), *leftovers_of(self.lora_path), *step_loras):
            leftover.unlink(missing_ok=True)


def run_fingerprint(
    base: SDXLBase, dataset: CaptionDataset, config: TrainConfig, version: int = RANDOMNESS_VERSION
) -> str:
    """Identifies everything that affects the steps of a run: base, dataset contents and settings, not name or length.

    `base` has the prediction type that is trained (train.as_trained). Evaluations are part of it if they decide which
    step ends the run or is saved. The LoRA to continue from is identified by its content, not its path. A setting of a
    later version counts only where it is set. Raises FileNotFoundError if the LoRA to continue from does not exist.
    """
    settings = {k: v for k, v in without_later_defaults(config).items() if k not in config.OUTSIDE_FINGERPRINT}
    if config.continue_from:
        start = Path(config.continue_from)
        if not start.is_file():
            raise FileNotFoundError(f"continue_from is {start}, which does not exist: give the path of a LoRA")
        settings["continue_from"] = file_sha256(start)
    settings |= prediction_arguments(base)  # whether the file, the base node or the run states it
    content = {
        "base": base.fingerprint,
        "dataset": dataset.fingerprint,
        "settings": settings,
        "version": version,
    }
    if _pins_fewer_tags(dataset, config):
        content["pinned_tags"] = "trigger words"
    deciding = deciding_evaluations(config, dataset)
    return json_sha256(content | {"looks": deciding} if deciding else content)


def _pins_fewer_tags(dataset: CaptionDataset, config: TrainConfig) -> bool:
    """Whether a caption has tags that versions before 0.4 pinned because they contain a trigger word: `cat ears`."""
    if not (config.shuffle_tags or config.tag_dropout):
        return False
    separator = config.tag_separator
    words = [part for word in (*dataset.trigger_words, *tokens_of(config)) for part in split_tags(word, separator)]
    captions = (split_tags(caption, separator) for entry in dataset.entries for caption in entry.captions)
    return any(pinned_tags(tags, words) != tags_with(tags, words) for tags in captions)


@contextmanager
def claim_run(folders: RunFolders, config: TrainConfig, fingerprint: str, earlier: Sequence[str] = ()) -> Iterator[Run]:
    """The run of this fingerprint and length if there is one, else a new one under the next free name.

    `earlier` are the fingerprints that former versions gave the same run; one of these is found if it is finished. A
    run that another process holds is skipped, so that two trainings never share a folder. Raises OSError if the
    folders cannot be written to.
    """
    identities = [
        {
            "fingerprint": one,
            "steps": config.steps,
            "kept": _kept(config),
            "format": [config.save_format, config.save_dtype],
        }
        for one in (fingerprint, *earlier)
    ]
    _check_writable(folders, config)
    run, lock = claim_name(config.lora_name, lambda name: _claim(name, folders, config, identities))
    try:
        write_text_atomic(run.folder / "identity", json.dumps(run.identity))
        run.sweep()
        yield run
    finally:
        lock.release()


def _claim(
    name: str, folders: RunFolders, config: TrainConfig, identities: Sequence[dict[str, Any]]
) -> tuple[Run, BaseFileLock] | None:
    """The run of this name and its lock, unless the name belongs to another run, LoRA or process.

    The first of `identities` is that of a new run; the others are those of finished ones.
    """
    from filelock import FileLock, Timeout

    run = Run(name, folders.runs / name, folders.loras / f"{name}.safetensors", identities[0])
    if run.known in identities[1:] and run.finished:
        run = replace(run, identity=run.known)
    known, identity = run.known, run.identity
    if known not in (None, identity) or (known is None and _is_taken(run, folders, config)):
        return None
    run.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run.folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    if run.known not in (None, identity):  # another process has claimed it in between
        lock.release()
        return None
    return run, lock


def related_runs(folders: RunFolders, run: Run, lora_name: str) -> list[Run]:
    """Other runs with names of this series that differ from `run` only in length or format."""
    series = re.compile(rf"{re.escape(lora_name)}(_\d{{5}})?")
    names = sorted(
        path.name for path in folders.runs.iterdir() if series.fullmatch(path.name) and path.name != run.name
    )
    known = [(name, _identity(folders.runs / name)) for name in names]
    return [
        Run(name, folders.runs / name, folders.loras / f"{name}.safetensors", identity)
        for name, identity in known
        if identity and all(identity.get(part) == run.identity[part] for part in ("fingerprint", "kept"))
    ]


def _kept(config: TrainConfig) -> list[Any]:
    """The settings that choose which step is saved; empty if it is always the last."""
    by_score = config.keep_best == "clip_score"
    if config.keep_best == "off" and not config.early_stopping:
        return []
    validation = [config.keep_best, config.early_stopping, config.validate_every]
    samples = [config.sample_every, config.clip_model, config.sample_steps, config.sample_guidance]
    return [*validation, *samples, *config.sample_prompts] if by_score else validation


def _identity(folder: Path) -> dict[str, Any] | None:
    """The identity stored in a folder; None if there is none."""
    file = folder / "identity"
    if not file.exists():
        return None
    try:
        identity = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        identity = None
    return identity if isinstance(identity, dict) else {"fingerprint": "unreadable"}


def _is_taken(run: Run, folders: RunFolders, config: TrainConfig) -> bool:
    """Whether its LoRA, or one of its new tokens, would overwrite an existing file."""
    clash = any(run.embedding(token).exists() for token in tokens_of(config))
    clash = clash or (run.step_loras.exists() and not run.folder.exists())
    return clash or folders.taken(run.lora_path.name)


def _check_writable(folders: RunFolders, config: TrainConfig) -> None:
    require_file_names(folders.loras, {"lora_name": config.lora_name})
    names = {f"lora_name with new_tokens {token}": f"{config.lora_name}-{token}" for token in tokens_of(config)}
    require_file_names(folders.loras.with_name("embeddings"), names)
    embeddings = [folders.loras.with_name("embeddings")] if config.new_tokens else []
    for folder in (folders.loras, folders.runs, folders.cache.root, *embeddings):
        probe = folder / f".probe-{os.getpid()}"
        try:
            write_text_atomic(probe, "probe")
            probe.unlink()
        except OSError as error:
            raise OSError(
                error.errno, f"cannot write to {folder}: {error.strerror}; training has not started"
            ) from error


def deciding_evaluations(config: TrainConfig, dataset: CaptionDataset) -> dict[str, Any]:
    """The evaluations that decide which step ends the run or is saved, as JSON values; empty if none do."""
    if not config.early_stopping and config.keep_best == "off":
        return {}
    deciding = {
        "early_stopping": config.early_stopping,
        "keep_best": config.keep_best,
        "validate_every": config.validate_every,
        "validation": [[entry.sha256, entry.caption, entry.resolution] for entry in dataset.validation],
    }
    if config.keep_best != "clip_score":
        return deciding
    return deciding | {
        "sample_every": config.sample_every,
        "samples": [config.sample_prompts, config.sample_steps, config.sample_guidance],
        "clip_model": folder_fingerprint(Path(config.clip_model)),
    }
