"""Reads run.yaml, the settings of a run with the paths of its base and images, which people may have edited."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..dataset.caption_dataset import CaptionDataset, load_caption_dataset, with_validation
from ..dataset.config import DatasetConfig
from ..messages import shown
from ..sdxl.base import open_base, require_vae
from ..sdxl.vae_override import with_vae
from ..settings import from_mapping
from ..training.config.train_config import TrainConfig
from ..training.job import TrainingJob

_BASE = ("path", "precision", "prediction", "zero_terminal_snr", "vae")


def read_run(path: Path, hash_memo: Path | None, changes: Mapping[str, Any] = MappingProxyType({})) -> TrainingJob:
    """The job of a run.yaml; `changes` override its train settings. All settings are checked before anything is loaded.

    Raises ValueError naming file, line and setting, FileNotFoundError for a base or dataset that does not exist.
    """
    file = _RunFile.read(path)
    train = file.mapping("train")
    config = from_mapping(TrainConfig, {**train, **changes}, file.where("train"))
    sources, held_out = file.folders("datasets"), file.folders("validation")
    if not sources:
        raise ValueError(f"{file.where('datasets')} is empty: name at least one folder")
    section = file.mapping("base")
    if unknown := sorted(set(section) - set(_BASE)):
        raise ValueError(f"{file.where('base')}: unknown setting {unknown[0]}; known are {', '.join(_BASE)}")
    stated = {name: value for name, value in section.items() if name not in ("path", "vae")}
    base = open_base(file.path_in(section, "path", "base"), hash_memo=hash_memo, **stated)
    if "vae" in section:
        base = with_vae(base, file.path_in(section, "vae", "base"), hash_memo)
    require_vae(base)
    dataset, validation = _load(sources, hash_memo), _load(held_out, hash_memo)
    assert dataset
    return TrainingJob(base, with_validation(dataset, validation) if validation else dataset, config)


@dataclass(frozen=True)
class _RunFile:
    """A run.yaml as it is written, with the line of each section."""

    name: str
    document: Mapping[str, Any]
    lines: Mapping[str, int]

    @classmethod
    def read(cls, path: Path) -> _RunFile:
        import yaml

        try:
            text = path.read_text(encoding="utf-8")
            document, root = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path.name} is not UTF-8: save it as UTF-8") from error
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise ValueError(f"{path.name}{_position(error)}: {_remedy(error)}") from error
        if not isinstance(document, dict) or not isinstance(root, yaml.MappingNode):
            raise ValueError(f"{path.name} is not a run: it needs the sections base, datasets and train")
        lines = {str(key.value): key.start_mark.line + 1 for key, _ in root.value}
        if missing := [section for section in ("base", "datasets", "train") if section not in document]:
            raise ValueError(f"{path.name} is not a run: it needs the section {missing[0]}")
        return cls(path.name, document, lines)

    def where(self, section: str) -> str:
        return f"{self.name} line {self.lines.get(section, 1)}: {section}"

    def mapping(self, section: str) -> Mapping[str, Any]:
        """A section of settings; an empty one has none."""
        return self._settings(self.document.get(section) or {}, section)

    def folders(self, section: str) -> list[tuple[Path, DatasetConfig]]:
        """A section with a list of folders and their settings."""
        entries = self.document.get(section) or []
        if not isinstance(entries, list):
            raise ValueError(f"{self.where(section)} is not a list: write one entry for each folder, as - folder: PATH")
        found = []
        for entry in entries:
            settings = {name: value for name, value in self._settings(entry, section).items() if name != "folder"}
            path = self.path_in(entry, "folder", section)
            found.append((path, from_mapping(DatasetConfig, settings, self.where(section))))
        return found

    def path_in(self, settings: Mapping[str, Any], name: str, section: str) -> Path:
        value = settings.get(name)
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            raise ValueError(f"{self.where(section)}: {name} is {shown(value)}: give a path as text")
        if not os.path.exists(value):  # Path.exists raises for a name that is too long
            raise FileNotFoundError(f"{self.where(section)}: {name} {shown(value)} does not exist")
        return Path(value)

    def _settings(self, values: Any, section: str) -> Mapping[str, Any]:
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise ValueError(f"{self.where(section)} has {shown(values)}: write settings as name: value")
        return values


def _position(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f" line {mark.line + 1}" if mark else ""


def _remedy(error: Exception) -> str:
    problem = getattr(error, "problem", None) or str(error).partition("\n")[0] or type(error).__name__
    if "escape" in problem:
        return f"{problem}: write paths with / or in single quotes, where \\ is a plain character"
    if "'\\t'" in problem:
        return f"{problem}: indent with spaces instead of tabs"
    return f"is not YAML ({problem})"


def _load(sources: Sequence[tuple[Path, DatasetConfig]], hash_memo: Path | None) -> CaptionDataset | None:
    dataset: CaptionDataset | None = None
    for folder, settings in sources:
        dataset = load_caption_dataset(folder, settings, dataset, hash_memo)
    return dataset
