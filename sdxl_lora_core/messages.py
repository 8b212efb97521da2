"""Values from people's files in messages: in one line, and no longer than one reads."""

from __future__ import annotations

from collections.abc import Sequence


def shown(value: object, most: int = 80) -> str:
    """The value as Python writes it, with at most `most` characters."""
    return _cut(repr(value), most)


def brief(error: object, most: int = 300) -> str:
    """An error's text in one line, with at most `most` characters."""
    return _cut(" ".join(str(error).split()), most)


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first `most` names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
