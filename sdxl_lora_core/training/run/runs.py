"""Names and folders of training runs: which name is free, which run is already there."""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...dataset.caption_dataset import CaptionDataset
from ...dataset.config import DatasetConfig
from ...evaluation.clip_model import clip_fingerprint
from ...files import file_sha256, json_sha256, next_names, write_text_atomic
from ...sdxl.base import SDXLBase, said_to_predict
from ...settings import to_yaml, without_later_defaults
from ..config.captions import tokens_of
from ..config.train_config import TrainConfig
from .checkpoints import Checkpoints

_UUID = "[0-9a-f]" * 32
RANDOMNESS_VERSION = 1  # raised when noise, order or initialisation change: old runs are then not continued


@dataclass(frozen=True)
class RunFolders:
    """Where a run reads and writes. `taken` says whether a LoRA's file name exists in any folder of LoRAs."""

    loras: Path
    runs: Path
    cache: Path
    taken: Callable[[str], bool]


@dataclass(frozen=True)
class Run:
    """One run: its name, its folder, and the identity by which it is found again: fingerprint, length and form."""

    name: str
    folder: Path
    lora_path: Path
    identity: dict[str, Any]

    @property
    def finished(self) -> bool:
        return self.lora_path.exists() and (self.folder / "finished").exists()

    @property
    def known(self) -> dict[str, Any] | None:
        """The identity that its folder belongs to; None for a folder in which no step was taken."""
        begun = self.checkpoints.exist or self.finished or (self.folder / "report.json").exists()
        return _identity(self.folder) if begun else None

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.folder / "checkpoints", self.identity["fingerprint"])

    def embedding(self, token: str) -> Path:
        """The file of a new token alone, in the folder `embeddings` beside that of the LoRAs."""
        return self.lora_path.parent.with_name("embeddings") / f"{self.name}-{token}.safetensors"

    def sweep(self) -> None:
        """Removes what a process that was killed while it wrote has left. Nobody else writes under this name."""
        self.checkpoints.sweep()
        own = glob.escape(self.lora_path.name)
        for leftover in (*self.folder.glob(".*.tmp"), *self.lora_path.parent.glob(f".{own}.{_UUID}.tmp")):
            leftover.unlink(missing_ok=True)


def run_fingerprint(base: SDXLBase, dataset: CaptionDataset, config: TrainConfig) -> str:
    """What decides every step of the run: base, dataset contents and settings, but not its name or its length.

    `base` is said to predict what it is trained to (train.as_trained). What is looked at belongs to it where it
    decides which step ends the run or is kept. Raises FileNotFoundError if the LoRA to continue from is gone; its
    content counts, not its path. A setting that a later version added counts only where it is set.
    """
    settings = {k: v for k, v in without_later_defaults(config).items() if k not in config.OUTSIDE_FINGERPRINT}
    if config.continue_from:
        start = Path(config.continue_from)
        if not start.is_file():
            raise FileNotFoundError(f"continue_from is {start}, which is no file: give the path of a LoRA")
        settings["continue_from"] = file_sha256(start)
    settings |= said_to_predict(base)  # what is trained, whether the file, the base's own setting or the run's says so
    content = {
        "base": base.fingerprint,
        "dataset": dataset.fingerprint,
        "settings": settings,
        "version": RANDOMNESS_VERSION,
    }
    deciding = deciding_looks(config, dataset)
    return json_sha256(content | {"looks": deciding} if deciding else content)


@contextmanager
def claim_run(folders: RunFolders, config: TrainConfig, fingerprint: str) -> Iterator[Run]:
    """The run of this fingerprint and length if there is one, else the next name that is free everywhere.

    A run that another process holds is passed over, so that two trainings never share a folder. Raises OSError before
    anything long begins if the folders cannot be written.
    """
    from filelock import FileLock, Timeout

    identity = {
        "fingerprint": fingerprint,
        "steps": config.steps,
        "kept": _kept(config),
        "format": [config.save_format, config.save_dtype],
    }
    _check_writable(folders, config)
    for name in next_names(config.lora_name):
        run = Run(name, folders.runs / name, folders.loras / f"{name}.safetensors", identity)
        known = run.known
        if known not in (None, identity) or (known is None and _is_taken(run, folders, config)):
            continue
        run.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        try:
            if run.known in (None, identity):
                write_text_atomic(run.folder / "identity", json.dumps(identity))
                run.sweep()
                yield run
                return
        finally:
            lock.release()


def related_runs(folders: RunFolders, run: Run, lora_name: str) -> list[Run]:
    """Other runs of the same base, data and settings in this series of names: they differ in length or format only."""
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
    """What decides of which step the file holds the adapter; empty for the last one."""
    by_score = config.keep_best == "clip_score"
    if config.keep_best == "off" and not config.early_stopping:
        return []
    watched = [config.keep_best, config.early_stopping, config.validate_every]
    samples = [config.sample_every, config.clip_model, config.sample_steps, config.sample_guidance]
    return [*watched, *samples, *config.sample_prompts] if by_score else watched


def save_settings(
    run: Run, base: SDXLBase, dataset: CaptionDataset, config: TrainConfig, facts: dict[str, Any]
) -> None:
    """Writes run.yaml: everything that repeats the run, paths included."""
    to_yaml(
        run.folder / "run.yaml",
        {
            "base": {
                "path": str(base.path),
                "precision": base.precision,
                **said_to_predict(base),
                **({"vae": str(base.vae)} if base.vae else {}),
            },
            "datasets": _sections(dataset.sources),
            "validation": _sections(dataset.validation_sources),
            "train": config,
            "run": facts,
        },
    )


def _sections(sources: Sequence[tuple[Path, DatasetConfig]]) -> list[dict[str, Any]]:
    return [{"folder": str(folder), **dataclasses.asdict(settings)} for folder, settings in sources]


def _identity(folder: Path) -> dict[str, Any] | None:
    """None for a folder that is no run's yet."""
    file = folder / "identity"
    if not file.exists():
        return None
    try:
        identity = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        identity = None
    return identity if isinstance(identity, dict) else {"fingerprint": "unreadable"}


def _is_taken(run: Run, folders: RunFolders, config: TrainConfig) -> bool:
    """Whether its LoRA, or one of its new tokens, would overwrite somebody's file."""
    clash = any(run.embedding(token).exists() for token in tokens_of(config))
    return clash or folders.taken(run.lora_path.name)


def _check_writable(folders: RunFolders, config: TrainConfig) -> None:
    embeddings = [folders.loras.with_name("embeddings")] if config.new_tokens else []
    for folder in (folders.loras, folders.runs, folders.cache, *embeddings):
        probe = folder / f".probe-{os.getpid()}"
        try:
            write_text_atomic(probe, "probe")
            probe.unlink()
        except OSError as error:
            raise OSError(
                error.errno, f"cannot write to {folder}: {error.strerror}; training has not started"
            ) from error


def deciding_looks(config: TrainConfig, dataset: CaptionDataset) -> dict[str, Any]:
    """What decides which step ends the run or is kept, as JSON values; empty where nothing but `steps` does."""
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
        "clip_model": clip_fingerprint(Path(config.clip_model)),
    }
