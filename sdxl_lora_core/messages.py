"""Values from people's files in messages: in one line, and no longer than one reads."""

from __future__ import annotations


def shown(value: object, most: int = 80) -> str:
    """The value as Python writes it, with at most `most` characters."""
    return _cut(repr(value), most)


def brief(error: object, most: int = 300) -> str:
    """An error's text in one line, with at most `most` characters."""
    return _cut(" ".join(str(error).split()), most)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
