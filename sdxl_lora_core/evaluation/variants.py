"""The variants of a comparison: LoRAs, checkpoints, strengths and settings of generation along two axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..generation.config import GenerateConfig
from ..lora.stack import LoRARef, read_blocks_of
from ..messages import shown
from ..sdxl.base import SDXLBase
from ..settings import fields_of, from_mapping, types_of

BASE = "base"
# What a comparison decides itself: every variant has the same prompts and seeds, and the cache is its own.
FIXED = ("prompt", "seed", "count", "prompt_per_line", "cache", "keep_latents")
STRENGTHS = ("strength", "strength_model", "strength_clip")
_ABOUT_LORAS = ("lora", "checkpoint", *STRENGTHS, "blocks")
_ALL = "all"


@dataclass(frozen=True)
class Variant:
    """One way to make the images: a stack of LoRAs, changed settings of generation, another base, or `given` images.

    `base` None is that of the comparison.
    `row` and `column` are its labels in the grid. `given` are uint8 [H, W, 3], ordered by prompt, then by seed.
    """

    name: str
    loras: tuple[LoRARef, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    given: Sequence[np.ndarray] | None = None
    row: str = ""
    column: str = ""
    base: SDXLBase | None = None

    def config(self, config: GenerateConfig) -> GenerateConfig:
        """`config` with the settings of the variant. Raises ValueError naming the variant for one that is not valid."""
        values = {name: getattr(config, name) for name in fields_of(GenerateConfig)}
        return from_mapping(GenerateConfig, {**values, **self.settings}, f"variant {self.name}")


@dataclass(frozen=True)
class Axis:
    """A row or column of variants: what changes, and its values as they are written."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class LoRAFiles:
    """Finds LoRAs by name. `find` raises FileNotFoundError. `checkpoints` are the LoRAs that a LoRA's run saved during
    training, by step, without the finished one."""

    find: Callable[[str, float, float], LoRARef]
    checkpoints: Callable[[str], Mapping[int, str]]


def parse_axis(text: str) -> Axis | None:
    """`strength: 0.5, 0.75, 1` as an axis; None if empty. Values that contain commas are separated by `|`.

    Raises ValueError for anything else, an unknown name, and a value that occurs twice.
    """
    text = text.strip()
    if not text:
        return None
    name, colon, rest = (part.strip() for part in text.partition(":"))
    values = tuple(value.strip() for value in rest.split("|" if "|" in rest else ",") if value.strip())
    if not colon or not values:
        raise ValueError(
            f"{shown(text)} is not an axis: write what changes and its values, as in strength: 0.5, 0.75, 1"
        )
    known = [*_ABOUT_LORAS, *(option for option in fields_of(GenerateConfig) if option not in FIXED)]
    if name not in known:
        raise ValueError(f"{shown(name)} cannot be an axis; known are {', '.join(known)}")
    if twice := [value for number, value in enumerate(values) if value in values[:number]]:
        raise ValueError(f"the axis {name} has the value {twice[0]} twice: remove one")
    return Axis(name, values)


def read_settings(text: str, name: str) -> dict[str, Any]:
    """`steps=20, sampler=euler` as settings of generation. Raises ValueError naming the variant."""
    settings = {}
    for part in filter(None, (part.strip() for part in text.replace("\n", ",").split(","))):
        option, equals, value = (side.strip() for side in part.partition("="))
        if not equals or option in FIXED or option not in fields_of(GenerateConfig):
            raise ValueError(
                f"variant {name}: {shown(part)} is not a setting of generation: write NAME=VALUE, such as steps=20"
            )
        settings[option] = _typed(option, value)
    return settings


def make_variants(
    stack: Sequence[LoRARef], columns: Axis | None, rows: Axis | None, files: LoRAFiles
) -> tuple[Variant, ...]:
    """The base without LoRAs, and the stack with all combinations of the values of both axes.

    Axes over LoRAs change the last LoRA of the stack. Without axes it is the stack as it is. Raises ValueError for two
    axes of one name, a value that does not fit, or an axis that needs a LoRA and has none; FileNotFoundError for a LoRA
    that does not exist.
    """
    if columns and rows and columns.name == rows.name:
        raise ValueError(f"rows and columns both change {columns.name}: change something else with one of them")
    axes = sorted((axis for axis in (columns, rows) if axis), key=lambda axis: axis.name not in ("lora", "checkpoint"))
    variants = [Variant(stack_name(stack), tuple(stack))] if stack or axes else []
    for axis in axes:
        place = "column" if axis is columns else "row"
        variants = [
            replace(_changed(variant, axis.name, value, files), **{place: _label(axis.name, value)})
            for variant in variants
            for value in _values(axis, variant, files)
        ]
    named = [replace(variant, name=_name(variant)) if axes else variant for variant in variants]
    return (Variant(BASE), *named)


def stack_name(stack: Sequence[LoRARef]) -> str:
    """The LoRAs of a stack in words, with strengths other than 1."""
    return " + ".join(_lora_name(lora) for lora in stack) or BASE


def require_distinct(variants: Sequence[Variant]) -> None:
    """Raises ValueError if two variants have one name: the tables could not tell them apart."""
    names = [variant.name for variant in variants]
    if twice := [name for number, name in enumerate(names) if name in names[:number]]:
        raise ValueError(f"two variants are called {shown(twice[0])}: give one another name")


def _values(axis: Axis, variant: Variant, files: LoRAFiles) -> tuple[str, ...]:
    if axis.name != "checkpoint" or axis.values != (_ALL,):
        return axis.values
    steps = files.checkpoints(_last(variant, axis.name).name)
    if not steps:
        raise ValueError(
            f"there are no LoRAs of earlier steps of {variant.loras[-1].name}: set save_every of Train Options: "
            "Watching before training"
        )
    return (*map(str, sorted(steps)), "last")


def _changed(variant: Variant, name: str, value: str, files: LoRAFiles) -> Variant:
    if name not in _ABOUT_LORAS:
        return replace(variant, settings={**variant.settings, name: _typed(name, value)})
    if name == "lora":
        return replace(variant, loras=(*variant.loras, files.find(value, 1.0, 1.0)))
    *others, last = (*variant.loras[:-1], _last(variant, name))
    return replace(variant, loras=(*others, _changed_lora(last, name, value, files)))


def _changed_lora(lora: LoRARef, name: str, value: str, files: LoRAFiles) -> LoRARef:
    if name == "checkpoint":
        return _checkpoint(lora, value, files)
    if name == "blocks":
        read_blocks_of(lora.name, value)
        return replace(lora, blocks=value)
    try:
        strength = float(value)
    except ValueError:
        raise ValueError(f"the axis {name} has the value {shown(value)}: give numbers such as 0.5, 1") from None
    changed = STRENGTHS[1:] if name == "strength" else (name,)
    return replace(lora, **dict.fromkeys(changed, strength))


def _checkpoint(lora: LoRARef, value: str, files: LoRAFiles) -> LoRARef:
    if value == "last":
        return lora
    steps = files.checkpoints(lora.name)
    if not value.isdecimal() or int(value) not in steps:
        known = ", ".join(map(str, sorted(steps))) or "none"
        raise ValueError(f"{lora.name} has no checkpoint {shown(value)}; known are {known}, {_ALL} and last")
    found = files.find(steps[int(value)], lora.strength_model, lora.strength_clip)
    return replace(found, blocks=lora.blocks)


def _last(variant: Variant, axis: str) -> LoRARef:
    if not variant.loras:
        raise ValueError(f"the axis {axis} changes the last LoRA of lora_stack, which has none: connect a LoRA")
    return variant.loras[-1]


def _typed(option: str, value: str) -> Any:
    """The text of a setting as a value of its type; pydantic says what does not fit."""
    if types_of(GenerateConfig)[option] is bool:
        return {"true": True, "on": True, "false": False, "off": False}.get(value.casefold(), value)
    return value


def _name(variant: Variant) -> str:
    return " / ".join(label for label in (variant.row, variant.column) if label)


def _label(name: str, value: str) -> str:
    """`my_lora` for a LoRA's file, else the name with the value."""
    return _stem(value) if name == "lora" else f"{name} {value}"


def _lora_name(lora: LoRARef) -> str:
    strengths = dict.fromkeys((lora.strength_model, lora.strength_clip))
    at = "" if list(strengths) == [1] else f" at {'/'.join(f'{strength:g}' for strength in strengths)}"
    return f"{_stem(lora.name)}{at}{f' ({lora.blocks})' if lora.blocks.strip() else ''}"


def _stem(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[2].removesuffix(".safetensors")
