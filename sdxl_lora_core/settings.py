"""Declares the settings of config dataclasses: default, range and help text, each stated once.

Widgets, help pages, the command line's list of settings and all checks are derived from these declarations.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Container, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, get_args, get_origin

from .messages import shown

MAX_SEED = 2**64 - 1
UNLIMITED = 1_000_000  # the upper end of a range that has no natural one
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


class Range(NamedTuple):
    """The values from `low` to `high`, both included.

    `step` is that of the widget's arrows. The page rounds a number to it only where `rounded` is on.
    """

    low: float
    high: float
    step: float | None = None
    rounded: bool = False


@dataclass(frozen=True)
class Setting:
    """The declaration of a setting, beside its name, type and default (see setting)."""

    help: str
    range: Range | None
    only_with: Mapping[str, Container[Any]]
    since: str


def setting(
    default: Any,
    help: str,
    range: Range | None = None,
    *,
    only_with: Mapping[str, Container[Any]] = MappingProxyType({}),
    since: str = "",
) -> Any:
    """Declares a field of a config dataclass.

    Args:
        default: its default, or dataclasses.MISSING for a required setting.
        help: what the setting does and when to change it.
        range: the range of a number.
        only_with: other settings, each with those of its values with which this setting has an effect. One of them is
            enough. A setting without effect is no error: see without_effect.
        since: the version that added the setting. Such a setting enters fingerprints only where it differs from its
            default, so that earlier runs are still found. Empty: it has been there since the first fingerprints and
            always enters them.
    """
    return dataclasses.field(default=default, metadata={"setting": Setting(help, range, only_with, since)})


class _NotEmpty:
    """Contains every value that is true: neither empty, nor 0, nor False."""

    def __contains__(self, value: object) -> bool:
        return bool(value)


NOT_EMPTY: Container[Any] = _NotEmpty()


class IsDataclass(Protocol):
    """Any dataclass, for which the standard library has no type."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


Config = TypeVar("Config", bound=IsDataclass)


def fields_of(config: type | object) -> Mapping[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(config)}  # type: ignore[arg-type]


def declared(config: type | object, option: str) -> Setting:
    return fields_of(config)[option].metadata["setting"]


@functools.cache
def types_of(config: type) -> Mapping[str, Any]:
    """The type of each field. A choice is a Literal."""
    return typing.get_type_hints(config)


def choices_of(config: type, option: str) -> tuple[str, ...]:
    """The values of a choice; empty for any other setting."""
    kind = types_of(config)[option]
    return get_args(kind) if get_origin(kind) is Literal else ()


def without_later_defaults(config: Any) -> dict[str, Any]:
    """The values of all settings, except those added by a later version (`since`) that are at their default."""
    values = dataclasses.asdict(config)
    return {
        name: values[name]
        for name, field in fields_of(config).items()
        if not declared(config, name).since or getattr(config, name) != field.default
    }


def check_settings(config: object) -> None:
    """Checks every setting by its declaration.

    Raises ValueError naming a setting that is out of its range, or not one of its choices.
    """
    for name in fields_of(config):
        _check_range(config, name)
        _check_choice(config, name)
        _check_text(config, name)


def _check_range(config: object, option: str) -> None:
    value, allowed = getattr(config, option), declared(config, option).range
    if allowed is not None and not allowed.low <= value <= allowed.high:
        raise ValueError(f"{option} is {value}: give a value from {_plain(allowed.low)} to {_plain(allowed.high)}")


def _plain(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def _check_choice(config: object, option: str) -> None:
    value, choices = getattr(config, option), choices_of(type(config), option)
    if choices and value not in choices:
        raise ValueError(f"{option} is {shown(value)}: choose one of {', '.join(choices)}")


def _check_text(config: object, option: str) -> None:
    value = getattr(config, option)
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(
                f"{option} is {shown(text)}, which contains half a character (a lone surrogate): type it again"
            )


def without_effect(config: object) -> dict[str, str]:
    """A sentence for each setting that was changed and has no effect with the values of the others, by its name."""
    found = {}
    for name, field in fields_of(config).items():
        value, others = getattr(config, name), declared(config, name).only_with
        if value == field.default or not others or any(getattr(config, other) in others[other] for other in others):
            continue
        reasons = " and ".join(f"{other} is {_worded(getattr(config, other))}" for other in others)
        found[name] = f"{name} is {_worded(value)}, which has no effect while {reasons}"
    return found


def _worded(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "empty" if value in ("", ()) else shown(value)


def default(config: type, option: str) -> Any:
    """The default of a setting; None if it is required."""
    found = fields_of(config)[option].default
    return None if found is MISSING else found


def to_yaml(path: Path, sections: dict[str, Any]) -> None:
    """Writes plain values and config dataclasses, one section each."""
    import yaml

    from .files import write_text_atomic

    plain = json.loads(json.dumps(sections, default=dataclasses.asdict))  # tuples become lists
    write_text_atomic(path, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def from_mapping(config: type[Config], values: Mapping[str, Any], where: str = "") -> Config:
    """Makes a config of `values`, with types checked by pydantic; `where`, if given, begins the message.

    Raises ValueError naming every unknown or invalid setting with its value and what it may be.
    """
    from pydantic import TypeAdapter, ValidationError

    begin = f"{where}: " if where else ""
    known = fields_of(config)
    unknown = sorted(set(values) - set(known))
    if unknown:
        names = ", ".join(shown(name)[1:-1] for name in unknown[:3])
        raise ValueError(f"{begin}unknown setting {names}; known are {', '.join(sorted(known))}")
    try:
        return TypeAdapter(config).validate_python(values)
    except ValidationError as error:
        problems = dict.fromkeys(_problem(config, item) for item in error.errors())
        raise ValueError(begin + "; ".join(problems)) from None  # pydantic's wording is not for users


def _problem(config: type, item: Any) -> str:
    """One of pydantic's errors in our words. An error of the config's own checks already is."""
    if own := item.get("ctx", {}).get("error"):
        return str(own)
    option, *inside = item["loc"]
    if item["type"] == "missing":
        return f"{option} is missing: give {kind_of(config, option)}"
    verb, value = "contains" if inside else "is", item["input"]
    quoted = isinstance(value, bool) and {"on", "off"} & {*choices_of(config, option)}
    hint = ", in quotes, because YAML reads on and off as true and false" if quoted else ""
    return f"{option} {verb} {shown(value)}: give {kind_of(config, option)}{hint}"


def kind_of(config: type, option: str) -> str:
    """What a setting may be, in words: its type and range, or its choices."""
    if choices := choices_of(config, option):
        return f"one of {', '.join(choices)}"
    kind, allowed = types_of(config)[option], declared(config, option).range
    limits = f" from {_plain(allowed.low)} to {_plain(allowed.high)}" if allowed else ""
    return _KINDS.get(kind, "a list of texts") + limits
