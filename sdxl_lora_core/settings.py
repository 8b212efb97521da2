"""What a setting of a config dataclass is: its default, its range and a sentence of help, stated once."""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_args, get_origin

MAX_SEED = 2**64 - 1
MANY = 1_000_000


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    step: float | None = None,
    group: str = "",
    only_with: tuple[str, Container[Any]] | None = None,
    since: str = "",
) -> Any:
    """A field with `help` (when to touch it), its range, the `step` of its widget and the option node that shows it.

    `only_with` names another setting and its values without which this one would do nothing. `since` is the version
    that added the setting; it enters fingerprints only where it differs from its default, so that runs made before are
    found again. Empty: it has been there since the first fingerprints and always enters them.
    """
    metadata = {
        "help": help,
        "low": low,
        "high": high,
        "step": step,
        "group": group,
        "only_with": only_with,
        "since": since,
    }
    return dataclasses.field(default=default, metadata=metadata)


class _Something:
    """Holds every value that is not empty, 0 or off."""

    def __contains__(self, value: object) -> bool:
        return bool(value)


SOMETHING: Container[Any] = _Something()


def fields_of(config: type | object) -> Mapping[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(config)}  # type: ignore[arg-type]


def without_later_defaults(config: Any) -> dict[str, Any]:
    """The values of all settings but those that a later version added (`since`) and that stand at their default."""
    fields = fields_of(config)
    values = dataclasses.asdict(config)
    return {
        name: value
        for name, value in values.items()
        if not fields[name].metadata.get("since") or getattr(config, name) != fields[name].default
    }


@functools.cache
def types_of(config: type) -> Mapping[str, Any]:
    """The type of each field. Choices are Literals."""
    return typing.get_type_hints(config)


def choices_of(config: type, option: str) -> tuple[str, ...]:
    """The values a setting may have; empty if it is no choice."""
    kind = types_of(config)[option]
    return get_args(kind) if get_origin(kind) is Literal else ()


def check_settings(config: object) -> None:
    """Raises ValueError naming the setting that is out of its range, no choice or without effect, and the remedy."""
    for name, field in fields_of(config).items():
        value, low, high = getattr(config, name), field.metadata.get("low"), field.metadata.get("high")
        if low is not None and not low <= value <= (float("inf") if high is None else high):
            limit = f"give a value from {low:g}" + ("" if high is None else f" to {high:g}")
            raise ValueError(f"{name} is {value}: {limit}")
        choices = choices_of(type(config), name)
        if choices and value not in choices:
            raise ValueError(f"{name} is {value!r}: choose one of {', '.join(choices)}")
        _check_effect(config, field)


def _check_effect(config: object, field: dataclasses.Field[Any]) -> None:
    value, only_with = getattr(config, field.name), field.metadata.get("only_with")
    if only_with is None or value == field.default:
        return
    other, values = only_with
    if getattr(config, other) not in values:
        raise ValueError(
            f"{field.name} is {value} and does nothing while {other} is {getattr(config, other)!r}: "
            f"change {other}, or set {field.name} back to {field.default}"
        )


class IsDataclass(Protocol):
    """Any dataclass, for which the standard library has no type."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


Config = TypeVar("Config", bound=IsDataclass)


def check_range(config: object, option: str, low: float, high: float) -> None:
    value = getattr(config, option)
    if not low <= value <= high:
        raise ValueError(f"{option} is {value}: give a value from {low:g} to {high:g}")


def check_choice(config: object, option: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, option)
    if value not in choices:
        raise ValueError(f"{option} is {value!r}: choose one of {', '.join(choices)}")


def default(config: type[Config], option: str) -> Any:
    """The one stated default of an option, for widgets."""
    return {field.name: field.default for field in dataclasses.fields(config)}[option]


def to_yaml(path: Path, sections: dict[str, Any]) -> None:
    """Writes plain values and config dataclasses, a section each."""
    import yaml

    from .files import write_text_atomic

    plain = json.loads(json.dumps(sections, default=dataclasses.asdict))  # tuples become lists
    write_text_atomic(path, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def from_mapping(config: type[Config], values: dict[str, Any], where: str) -> Config:
    """The dataclass with `values`, checked by pydantic. Raises ValueError naming every unknown or wrong setting."""
    from pydantic import TypeAdapter, ValidationError

    known = {field.name for field in dataclasses.fields(config)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{where}: unknown setting {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    try:
        return TypeAdapter(config).validate_python(values)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, item['loc'])) or where}: {item['msg']}" for item in error.errors()]
        raise ValueError(f"{where}: " + "; ".join(lines)) from error
