"""Hypothesis strategies for damaged and hostile variants of a valid file."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

from hypothesis import strategies as st

# What has broken readers before, ours or others': limits, lookalikes, half characters, paths, deep nesting.
TEXTS = (
    "", " ", "\0", "\n", "\r\n\t", "\ud83d", "\u202e", "\ufeff", "é" * 200, "x" * 70_000, "None", "NaN", "1e999", "-1",
    "../../outside", "/etc/passwd", "C:\\outside", "a\\b", "con", ".", "..", "%s%n{0}{}", "((((((((((", ")", "[" * 3000,
    "<lora:a:1>", "embedding:x", "{a|b}", "a,b,,c",
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 0.5, -0.5, 1e-300, 1e300, 2**31, 2**63, 2**64, 10**30, math.inf, -math.inf, math.nan)
BYTES = (
    b"", b"\0", b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r", b"\n", b'"', b",", b";", b"\t", b"{",
    b"}", b"[" * 3000, b"\\ud83d", b"\x1a", b"%PDF", b"\0" * 4096, b"9" * 400, b"1e999", b"NaN", b"null", b": ", b"- ",
    b"&a *a",
)  # fmt: skip


def _deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


VALUES = (None, True, False, *NUMBERS, *TEXTS, [], {}, [[]], [None, 1, "a"], {"a": {"a": None}}, _deep(100))
values = st.sampled_from(VALUES).map(copy.deepcopy)


@st.composite
def bytes_of(draw: st.DrawFn, sample: bytes, most: int = 4) -> bytes:
    """`sample` after up to `most` edits."""
    data = bytearray(sample)
    for _ in range(draw(st.integers(1, most))):
        start, length = draw(st.integers(0, len(data))), draw(st.integers(0, 64))
        edit = draw(st.sampled_from(("flip", "delete", "insert", "replace", "repeat", "truncate")))
        if edit == "flip" and start < len(data):
            data[start] ^= 1 << draw(st.integers(0, 7))
        elif edit == "delete":
            del data[start : start + length]
        elif edit == "insert":
            data[start:start] = draw(st.sampled_from(BYTES))
        elif edit == "replace":
            data[start : start + length] = draw(st.binary(max_size=64))
        elif edit == "repeat":
            data[start:start] = data[start : start + length] * draw(st.integers(1, 50))
        elif edit == "truncate":
            del data[start:]
    return bytes(data)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON document."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [*([path] if path else []), *(place for key in keys for place in _places(value[key], (*path, key)))]


@st.composite
def json_of(draw: st.DrawFn, document: Any, most: int = 3) -> Any:
    """`document` after up to `most` values were replaced, removed or added, as JSON allows them."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, most))):
        places = _places(changed)
        if not places:
            return draw(values)
        *path, key = draw(st.sampled_from(places))
        holder = changed
        for step in path:
            holder = holder[step]
        edit = draw(st.sampled_from(("replace", "replace", "remove", "add", "rename")))
        if edit == "replace":
            holder[key] = draw(values)
        elif edit == "remove":
            del holder[key]
        elif isinstance(holder, list):
            holder.insert(key, draw(values))
        elif edit == "add":
            holder[draw(st.sampled_from(TEXTS))] = draw(values)
        else:
            holder[draw(st.sampled_from(TEXTS))] = holder.pop(key)
    return changed


def json_bytes(document: Any) -> bytes:
    return json.dumps(document).encode()


def headers_of(sample: bytes) -> tuple[st.SearchStrategy[bytes], bytes]:
    """Headers of a safetensors file with other tensors, metadata, bytes or length, and the rest of the file."""
    start = 8 + int.from_bytes(sample[:8], "little")
    return json_of(json.loads(sample[8:start])).map(_with_length) | bytes_of(sample[:start]), sample[start:]


def _with_length(document: Any) -> bytes:
    header = json_bytes(document)
    return len(header).to_bytes(8, "little") + header
