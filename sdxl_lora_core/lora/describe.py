"""Describes a LoRA file: in some lines of text, and for pages that show it as a card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..safetensors_file import first_names
from .few_step import advice
from .files import read_lora
from .metadata import read_tag_counts, trigger_words
from .modules import AdapterModule, LoRAFile, LoRAModule

_SHOWN_TAGS = 5


@dataclass(frozen=True)
class LoRACard:
    """What a LoRA file says of itself.

    `lines` has modules, ranks and alphas, the number of keys that are applied, trigger words and the training base.
    """

    name: str
    lines: tuple[str, ...]
    trigger_words: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([self.name, *self.lines])

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def read_card(path: Path) -> LoRACard:
    file = read_lora(path)
    return LoRACard(path.name, tuple(_lines(path.name, file)), trigger_words(file.metadata))


def describe_lora(path: Path) -> str:
    """The card of a file as text."""
    return str(read_card(path))


def _lines(name: str, file: LoRAFile) -> list[str]:
    lines = []
    for part, modules in file.parts().items():
        if modules:
            ranks = sorted({module.rank for module in modules.values() if module.rank})
            alphas = sorted({module.alpha for module in modules.values()})
            kinds = "/".join(sorted({_kind(module) for module in modules.values()}))
            lines.append(f"{part}: {kinds} of {len(modules)} modules, rank {_span(ranks)}, alpha {_span(alphas)}")
    for token, vectors in file.tokens.items():
        lines.append(f"new token {token}: {len(vectors['text_encoder'])} vectors")
    lines.append(f"{file.found - len(file.unknown)} of {file.found} keys are applied")
    if file.unknown:
        lines.append(f"{len(file.unknown)} keys are unknown: {first_names(file.unknown)}")
    return [*lines, *_words(file.metadata), *_training(file.metadata), *_few_steps(name, file.metadata)]


def _kind(module: AdapterModule) -> str:
    return "DoRA" if isinstance(module, LoRAModule) and module.is_dora else module.kind


def _span(values: Sequence[float]) -> str:
    if not values:
        return "full"
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _words(metadata: Mapping[str, str]) -> list[str]:
    """The trigger words if the file has them, else its most frequent tags."""
    if words := trigger_words(metadata):
        return [f"trigger words: {', '.join(words)}"]
    tags = Counter[str]()
    for counts in read_tag_counts(metadata).values():
        tags.update({tag.strip(): count for tag, count in counts.items()})
    return [f"most frequent tags: {', '.join(tag for tag, _ in tags.most_common(_SHOWN_TAGS))}"] if tags else []


def _training(metadata: Mapping[str, str]) -> list[str]:
    if base := metadata.get("ss_sd_model_name"):
        return [f"trained on {base} for {metadata.get('ss_steps', 'unknown')} steps"]
    base = metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture")
    return [f"trained on {base}"] if base else []


def _few_steps(name: str, metadata: Mapping[str, str]) -> list[str]:
    found = advice(name, metadata)
    if found is None:
        return []
    return [
        f"{found.kind}, for few steps: sampler {found.sampler}, scheduler {found.scheduler}, steps {found.steps}, "
        f"guidance {found.guidance}"
    ]
